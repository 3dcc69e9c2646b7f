"""Ranks join, tell each other values, and listen where they were told to, and nowhere else."""

from __future__ import annotations

import psutil
from crew import Crew

VALUES = """
from flexgen.errors import EngineError

def body(ranks):
    assert (ranks.size, len(ranks.hosts), set(ranks.hosts)) == (3, 3, {socket.gethostname()})
    assert ranks.address == "127.0.0.1"
    ranks.publish(f"value/{ranks.rank}", {"rank": ranks.rank, "text": "ä"})
    assert [ranks.lookup(f"value/{rank}") for rank in range(3)] == [{"rank": rank, "text": "ä"} for rank in range(3)]
    if ranks.rank == 0:
        ranks.publish("late", {})
    else:
        ranks.lookup("late")
    try:
        ranks.lookup("never", 0.2)
    except StageError as error:
        say(error)
    for wrong in (ranks.rank, 3, -1):
        try:
            ranks.sender(wrong)
        except EngineError:
            continue
        say("a channel to", wrong)

run(body)
"""


def test_what_a_rank_publishes_all_others_can_look_up(crew: Crew) -> None:
    crew.start(3, VALUES)
    crew.end_well()
    assert [crew.printed(rank) for rank in range(3)] == ["no rank has said 'never' within 0.2 s\nended\n"] * 3


OPEN = """
def body(ranks):
    sender, receiver = ranks.sender((ranks.rank + 1) % ranks.size), ranks.receiver((ranks.rank - 1) % ranks.size)
    assert (ranks.sender(sender.peer), ranks.receiver(receiver.peer)) == (sender, receiver)
    sender.send("hello", {}, [torch.ones(3)])
    receiver.receive()
    say("ready")
    while not os.path.exists(os.environ["GO"]):
        time.sleep(0.01)

run(body)
"""


def test_nothing_listens_beyond_the_given_interface(crew: Crew, tmp_path: object) -> None:
    go = f"{tmp_path}/go"
    crew.start(2, OPEN, GO=go)
    for rank in range(2):
        crew.wait_for(rank, "ready")
    for process in crew.processes:
        open_sockets = psutil.Process(process).net_connections("inet")
        listening = [each.laddr.ip for each in open_sockets if each.status == psutil.CONN_LISTEN]
        assert listening
        assert set(listening) == {"127.0.0.1"}
        assert {each.laddr.ip.removeprefix("::ffff:") for each in open_sockets} == {"127.0.0.1"}
    with open(go, "w"):  # noqa: PTH123
        pass
    crew.end_well()
