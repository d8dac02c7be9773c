"""Count the requests that the server failed to answer."""

from google.protobuf import struct_pb2

import persipubsub.subscriber

failed = 0
with persipubsub.subscriber.Sub() as sub:
    sub.init(sub_id="alarm", config_pth="config.json")
    while True:
        with sub.receive(timeout=1) as msg:
            if msg is None:
                break
            message = struct_pb2.Struct.FromString(msg)
            if str(message["line"]).endswith(" 500"):
                failed += 1

print(f"{failed} requests failed")
