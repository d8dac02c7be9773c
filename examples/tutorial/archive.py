"""Append each line to a file; pause after each one for as many seconds as the argument says."""

import sys
import time

from google.protobuf import struct_pb2

import persipubsub.subscriber

pause = float(sys.argv[1]) if len(sys.argv) > 1 else 0.0
count = 0
with open("archive.txt", "a", encoding="utf-8") as archive, persipubsub.subscriber.Sub() as sub:
    sub.init(sub_id="archive", config_pth="config.json")
    while True:
        with sub.receive(timeout=1) as msg:
            if msg is None:
                break
            message = struct_pb2.Struct.FromString(msg)
            archive.write(f"{message['number']} {message['line']}\n")
            archive.flush()
            time.sleep(pause)
        # Here the message is acknowledged, and not before the line is in the file.
        count += 1

print(f"archived {count} lines")
