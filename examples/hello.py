"""Send a message, and receive it."""
from persipubsub import Pub, Sub, control

config = {"pub": {"out_queue": "greetings"}, "sub": {"in_queue": "greetings"},
          "queues": {"greetings": {"subscribers": ["sub"]}}}  # yapf: disable
control.initialize_all_dbs(config)
with Pub("pub", config) as pub, Sub("sub", config) as sub:
    pub.send(b"hello")
    with sub.receive(timeout=60) as msg:
        print(msg)
