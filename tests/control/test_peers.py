"""Who counts as lost: silence of a whole machine soon, of a rank on a live machine much later."""

from spmd_rl.control.peers import STALL_FACTOR, Heartbeats


def test_a_silent_machine_is_lost_after_the_timeout() -> None:
    beats = Heartbeats(["a", "b", "b"], timeout=8.0, here="a")
    for second in range(10):
        beats.update({1: b"same", 2: b"same"}, 1.0)
        assert bool(beats.lost([1, 2])) == (second > 8), second
    assert [rank for rank, _ in beats.lost([1, 2])] == [1, 2]
    assert "no heartbeat for 9 s" in beats.lost([1])[0][1]


def test_a_rank_that_holds_the_interpreter_gets_more_patience() -> None:
    beats = Heartbeats(["a", "b", "b"], timeout=8.0, here="a")
    for second in range(int(8 * STALL_FACTOR)):
        beats.update({1: b"same", 2: str(second).encode()}, 1.0)
    assert beats.lost([1, 2]) == []
    assert beats.quiet(2.5) == [1]
    for second in range(3):
        beats.update({1: b"same", 2: f"later{second}".encode()}, 1.0)
    assert [rank for rank, _ in beats.lost([1, 2])] == [1]


def test_neighbours_on_this_machine_vouch_by_running_here() -> None:
    beats = Heartbeats(["a", "a"], timeout=8.0, here="a")
    for _ in range(20):
        beats.update({1: b"same"}, 1.0)
    assert beats.lost([1]) == []  # frozen ones are seen by their process state
