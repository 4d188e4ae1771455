"""What a way back keeps of a step: stages in a byte each, everything as it was."""

from __future__ import annotations

import torch

from lpm.passes.kept import Kept
from lpm.passes.steps import spread


def _stages(agents: int, lanes: int, length: int) -> torch.Tensor:
    place = torch.randint(length, (agents, lanes), generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.one_hot(place, length).to(torch.float64)


def test_what_is_kept_comes_back_and_stages_take_a_byte():
    one_hot, twice = _stages(50, 3, 7), _stages(50, 3, 7)
    twice[3, 1] = 0.0  # nobody's stage
    carry = {
        "state:sir.stage": one_hot,
        "state:odd.stage": twice,
        "state:viral.load": torch.rand(50, 3, dtype=torch.float64),
        "state:labour.works": _stages(50, 3, 2)[..., 0],
        "env:mobility": torch.rand(3, dtype=torch.float64),
    }
    sums = {"sir/city": torch.rand(4, 3, dtype=torch.float64)}
    kept = Kept()
    for _ in range(2):
        kept.add(carry, sums)
    state = kept.snapshot()
    for each in (kept, Kept.restored(state | {"step": 2})):
        assert len(each) == 2
        for t in range(2):
            found = each[t]
            assert list(found[0]) == list(carry) and list(found[1]) == list(sums)
            for name, value in (carry | sums).items():
                assert torch.equal((found[0] | found[1])[name], value) and value.dtype == torch.float64
    bytes_of = {name: array.nbytes for name, array in state.items()}
    assert bytes_of["kept:1:stages7:state:sir.stage"] == 50 * 3
    assert bytes_of["kept:1:carry:state:odd.stage"] == 50 * 3 * 7 * 8
    # A checkpoint of ranks takes them apart by agent, like any state.
    assert spread("kept:1:stages7:state:sir.stage") == spread("kept:1:carry:state:viral.load") == ("agents", 0)
