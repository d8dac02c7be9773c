"""Publish each line of a log as a protobuf message."""

from google.protobuf import struct_pb2

import persipubsub.publisher

with open("access.log", encoding="utf-8") as log, persipubsub.publisher.Pub() as pub:
    pub.init(pub_id="reader", config_pth="config.json")
    count = 0
    for count, line in enumerate(log, start=1):
        message = struct_pb2.Struct()
        message.update({"number": str(count), "line": line.rstrip("\n")})
        pub.send(msg=message.SerializeToString())

print(f"published {count} lines")
