"""Append each line to a file; pause after each one for as many seconds as the argument says."""

import sys
import time

from google.protobuf import struct_pb2

from persipubsub import Sub

pause = float(sys.argv[1]) if len(sys.argv) > 1 else 0.0
count = 0
with open("archive.txt", "a", encoding="utf-8") as archive, Sub("archive", "config.json") as sub:
    for msg in sub.messages(timeout=1):
        message = struct_pb2.Struct.FromString(msg)
        archive.write(f"{message['number']} {message['line']}\n")
        archive.flush()
        time.sleep(pause)
        count += 1
        # The message is acknowledged when the loop asks for the next one: the line is in the file.

print(f"archived {count} lines")
