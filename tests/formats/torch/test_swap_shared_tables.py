"""One table that several lookups read: centred once, where all of them want it so."""

import pytest
import torch
from torch import nn

import normtool
from normtool.formats.torch.export import Example, export
from tests.swap_models import refuse_default_initialisation


class Encoders(nn.Module):
    """Two lookups of one table, each under a LayerNorm; `head` reads the table as it is."""

    def __init__(self, tied_head: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 16)
        self.left, self.right = (nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8)) for _ in range(2))
        self.positions = nn.Parameter(torch.randn(6, 16))
        self.tied_head = tied_head

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        left = self.left(self.table(one) + self.positions)
        right = self.right(self.table(other) - self.positions)
        if self.tied_head:
            return nn.functional.linear(torch.cat([left, right], -1), self.table.weight)
        return left * right


@pytest.mark.parametrize("tied_head", [False, True])
def test_a_table_is_stored_as_often_as_it_differs(tied_head: bool):
    torch.manual_seed(0)
    model = Encoders(tied_head).eval()
    for norm in (model.left[0], model.right[0]):
        nn.init.normal_(norm.weight, 1, 0.2)
        nn.init.normal_(norm.bias, 0, 0.2)
    refuse_default_initialisation(model)
    inputs = {"one": torch.randint(0, 40, (2, 6)), "other": torch.randint(0, 40, (2, 6))}
    result = normtool.swap(export(model, Example(kwargs=inputs)), inputs)
    tables = [t for t in result.model.state_dict.values() if tuple(t.shape) == (40, 16)]
    assert len(tables) == 1
    if tied_head:  # a copy would be most of the model, and a Centre serves one norm
        assert {reason.code for site in result.sites for reason in site.reasons} >= {"shared_parameter"}
        assert (result.swapped, result.changed) == (0, False)
        return
    assert result.validation is not None
    assert (result.swapped, result.validation.verdict) == (2, "equal")
    assert [site.to_dict()["centring"]["added_bytes"] for site in result.sites] == [0, 0]
    assert not torch.equal(tables[0], model.table.weight)
