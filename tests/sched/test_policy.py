from __future__ import annotations

from typing import get_args, get_type_hints

from hypothesis import given
from hypothesis import strategies as st

from gllm_engine.config import EngineConfig
from gllm_engine.sched.policy import POLICIES, Budget, Load, chunked_prefill


@given(
    st.builds(
        Load,
        max_tokens=st.integers(1, 4096),
        num_decoding=st.integers(0, 4096),
        backlog=st.integers(0, 100_000),
        num_free_pages=st.integers(0, 1000),
        num_pages=st.just(1000),
    )
)
def test_chunked_prefill_takes_all_decodes_and_fills_the_step(load: Load) -> None:
    assert chunked_prefill(load) == Budget(load.num_decoding, load.max_tokens)


def test_every_policy_of_the_config_exists() -> None:
    assert set(POLICIES) == set(get_args(get_type_hints(EngineConfig)["schedule_policy"]))
