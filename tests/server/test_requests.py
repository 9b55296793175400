from __future__ import annotations
import time
def test_x(server):
    print(server.stubs(), server.triton_pid, server.is_idle())
    with server.client() as c:
        print(c.complete("ROMEO:", max_tokens=8))
    assert 0
