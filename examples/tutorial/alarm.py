"""Count the requests that the server failed to answer."""

from google.protobuf import struct_pb2

from persipubsub import Sub

failed = 0
with Sub("alarm", "config.json") as sub:
    for msg in sub.messages(timeout=1):
        message = struct_pb2.Struct.FromString(msg)
        if str(message["line"]).endswith(" 500"):
            failed += 1

print(f"{failed} requests failed")
