"""Publish each line of a log as a protobuf message."""

from google.protobuf import struct_pb2

from persipubsub import Pub

with open("access.log", encoding="utf-8") as log, Pub("reader", "config.json") as pub:
    count = 0
    for count, line in enumerate(log, start=1):
        message = struct_pb2.Struct()
        message.update({"number": str(count), "line": line.rstrip("\n")})
        pub.send(message.SerializeToString())

print(f"published {count} lines")
