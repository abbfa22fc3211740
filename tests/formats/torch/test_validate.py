"""`validate` with PyTorch on one side or both: right rewrites, wrong ones, and models that show nothing."""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import normtool
from normtool.api import load
from normtool.comparison import OutputRuns, compare
from normtool.errors import BackendUnavailable, RuntimeRefused, UsageError
from normtool.formats.torch import torch_side
from normtool.formats.torch.export import Example, export, undisturbed
from normtool.formats.torch.float64 import Float64Program
from normtool.formats.torch.model import TorchModel, read_exported, read_module
from normtool.formats.torch.run import validate_torch
from tests.formats.torch.architectures import ARCHITECTURES, Architecture

HAS_GPU = torch.cuda.is_available()


pytestmark = pytest.mark.usefixtures("worker_in_this_process", "translations_read_once")


# ---- models ---------------------------------------------------------------------------------------------


class ConvNorm(nn.Module):
    """Conv → BatchNorm → some function, statistics away from their initial values."""

    def __init__(self, behind: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 3)
        self.bn = nn.BatchNorm2d(6)
        self.behind = behind
        with torch.no_grad():
            self.bn.running_mean.normal_()
            self.bn.running_var.uniform_(0.5, 2)
            self.bn.weight.copy_(torch.tensor([0.7, -1.2, 1.4, -0.3, 0.9, 1.1]))
            self.bn.bias.normal_()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.bn(self.conv(x)))


def folded(model: ConvNorm, mistake: str = "") -> nn.Module:
    """The BatchNorm folded by hand, with or without a mistake."""
    made = copy.deepcopy(model)
    bn = made.bn
    s = bn.weight.double() / torch.sqrt(bn.running_var.double() + (0 if mistake == "no epsilon" else bn.eps))
    if mistake == "sign lost":
        s = s.abs()
    t = bn.bias - bn.running_mean * s
    if mistake == "wrong sign":
        t = bn.bias + bn.running_mean * s
    with torch.no_grad():
        made.conv.weight.copy_(made.conv.weight * s.reshape(-1, 1, 1, 1))
        made.conv.bias.copy_(made.conv.bias * (1 if mistake == "bias not scaled" else s) + t)
    made.bn = nn.Identity()
    return made


MISTAKES = ["wrong sign", "sign lost", "no epsilon", "bias not scaled"]


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def opened(model: nn.Module, *args: Any, **kwargs: Any) -> TorchModel:
    return read_module(model, Example(args, kwargs))


def to_onnx(module: nn.Module, path: Path, *args: Any, **options: Any) -> Any:
    """torch.onnx.export's own conversion, read back."""
    with undisturbed():
        torch.onnx.export(module, args, path, verbose=False, optimize=True, **options)
    return load(path)


class Tokens(nn.Module):
    """An embedding of 50 rows: any other index raises."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        scores = self.head(self.norm(self.table(input_ids)))
        return scores.masked_fill(attention_mask[..., None] == 0, 0.0)


class CastingNorm(nn.Module):
    """RMSNorm as Llama has it: in float32, whatever comes in."""

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(16, 64)
        self.gain = nn.Parameter(torch.rand(64) + 0.5)
        self.last = nn.Linear(64, 16)
        self.eps = eps
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        wide = x.to(torch.float32)
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True, dtype=torch.float32) + self.eps)
        ramp = torch.arange(64, dtype=torch.float32) / 64 + torch.full((1,), 0.1, dtype=torch.float32)
        return self.last(self.gain * (wide * scale).to(x.dtype) + ramp.to(x.dtype))


class Sigmoid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(1e4 + 0 * x) + 0 * x


# ---- right and wrong ------------------------------------------------------------------------------------


def test_a_fold_by_hand_without_mistake_is_equal():
    model = ConvNorm()
    found = validate_torch(opened(model, image()), opened(folded(model), image()))
    assert found.verdict == "equal"
    assert found.sensitivity.verdict == "different"
    assert found.sensitivity.site == "conv.weight"
    assert found.providers == {"requested": "cpu", "effective": ["torch cpu"]}
    assert found.notes == ()
    (output,) = found.outputs
    assert 0 < output.noise_floor < 1e-5
    assert output.ratio <= 4


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_fold_with_a_mistake_is_different(mistake):
    model = ConvNorm()
    found = validate_torch(opened(model, image()), opened(folded(model, mistake), image()))
    assert found.verdict == "different"


@pytest.mark.parametrize("row", [0, 5])
def test_one_row_of_one_weight_wrong_by_one_percent_is_different(row):
    model = ConvNorm()
    wrong = folded(model)
    with torch.no_grad():
        wrong.conv.weight[row] *= 1.01
    assert validate_torch(opened(model, image()), opened(wrong, image())).verdict == "different"


@pytest.mark.parametrize("mistake", ["", *MISTAKES])
def test_nothing_is_equal_behind_a_saturated_output(mistake):
    model = ConvNorm(behind=lambda x: torch.sigmoid(x * 0 + 100))
    found = validate_torch(opened(model, image()), opened(folded(model, mistake), image()))
    assert found.verdict == "inconclusive"
    assert found.sensitivity.verdict == "equal"
    assert "an error of 1 % does not show at the outputs" in found.notes


def test_nan_in_the_reference_is_no_agreement():
    model = ConvNorm(behind=lambda x: x * float("nan"))
    found = validate_torch(opened(model, image()), opened(model, image()))
    assert found.verdict == "inconclusive"
    assert any("computes NaN" in note for note in found.notes)


def test_a_model_without_weights_shows_nothing():
    found = validate_torch(opened(Sigmoid(), image()), opened(Sigmoid(), image()))
    assert found.verdict == "inconclusive"
    assert found.sensitivity is None


def test_another_dtype_is_different():
    model = ConvNorm()
    wide = ConvNorm(behind=lambda x: torch.relu(x).double())
    assert validate_torch(opened(model, image()), opened(wide, image())).verdict == "different"


def test_batch_statistics_are_compared_without_a_trace():
    model = ConvNorm().train()
    before = copy.deepcopy(model.state_dict())
    assert validate_torch(opened(model, image()), opened(copy.deepcopy(model), image())).verdict == "equal"
    assert validate_torch(opened(model, image()), opened(ConvNorm(), image())).verdict == "different"
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# ---- programs -------------------------------------------------------------------------------------------


def test_a_module_equals_its_program_both_ways():
    model = ConvNorm()
    program = read_exported(export(model, Example((image(),))))
    assert validate_torch(opened(model, image()), program).verdict == "equal"
    assert validate_torch(program, opened(model, image())).verdict == "equal"
    assert validate_torch(program, program).verdict == "equal"


def test_a_program_of_a_wrong_fold_is_different():
    model = ConvNorm()
    program = read_exported(export(folded(model, "wrong sign"), Example((image(),))))
    assert validate_torch(opened(model, image()), program).verdict == "different"
    assert validate_torch(program, opened(model, image())).verdict == "different"


def test_a_program_with_an_open_batch_is_run_at_two_sizes():
    model = ConvNorm()
    program = read_exported(export(model, Example((image(),)), dynamic_batch=True))
    found = validate_torch(program, opened(folded(model), image()))
    assert found.verdict == "equal"
    assert sorted({shapes["x"][0] for shapes in found.inputs}) == [2, 3]


def test_a_program_at_one_size_is_run_at_one_size():
    program = read_exported(export(ConvNorm(), Example((image(),))))
    found = validate_torch(program, opened(ConvNorm(), image()))
    assert {shapes["x"][0] for shapes in found.inputs} == {2}
    assert found.notes == ()


class OtherAtThree(nn.Module):
    """Equal at the example's batch of 2 and nowhere else."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self.factor = factor
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (1 if x.shape[0] == 2 else self.factor)


def test_an_error_at_another_batch_size_is_found():
    x = torch.randn(2, 4)
    assert validate_torch(opened(OtherAtThree(1), x), opened(OtherAtThree(1), x)).verdict == "equal"
    assert validate_torch(opened(OtherAtThree(1), x), opened(OtherAtThree(2), x)).verdict == "different"


def test_a_module_that_runs_at_one_batch_size_only_says_so():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).view(2, 2, 2)

    model = Fixed().eval()
    found = validate_torch(opened(model, torch.randn(2, 4)), opened(model, torch.randn(2, 4)))
    assert found.verdict == "equal"
    assert found.notes == ("the dynamic dimensions ran at one size only",)


# ---- ONNX -----------------------------------------------------------------------------------------------


def test_a_module_equals_its_onnx_export_both_ways(tmp_path):
    model = ConvNorm()
    made = to_onnx(model, tmp_path / "m.onnx", image())
    forth = validate_torch(opened(model, image()), made)
    back = validate_torch(made, opened(model, image()))
    assert forth.verdict == back.verdict == "equal"
    assert forth.providers["effective"] == ["torch cpu", "CPUExecutionProvider"]
    assert [d.verdict for d in forth.default_level] == ["equal"]
    assert [d.verdict for d in back.default_level] == ["equal"]
    assert forth.sensitivity.verdict == back.sensitivity.verdict == "different"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_onnx_export_of_a_wrong_fold_is_different_both_ways(tmp_path, mistake):
    model = ConvNorm()
    made = to_onnx(folded(model, mistake), tmp_path / "m.onnx", image())
    assert validate_torch(opened(model, image()), made).verdict == "different"
    assert validate_torch(made, opened(model, image())).verdict == "different"


def test_an_open_batch_in_onnx_is_run_at_two_sizes(tmp_path):
    model = ConvNorm()
    batch = torch.export.Dim("batch")
    made = to_onnx(model, tmp_path / "m.onnx", image(), dynamic_shapes=({0: batch},))
    found = validate_torch(opened(model, image()), made)
    assert found.verdict == "equal"
    assert {shapes["x"][0] for shapes in found.inputs} == {2, 3}


def test_the_onnx_graph_tells_the_inputs_of_a_module_that_has_no_example(tmp_path):
    model = ConvNorm()
    made = to_onnx(model, tmp_path / "m.onnx", image())
    assert validate_torch(read_module(model, None), made).verdict == "equal"
    assert validate_torch(made, read_module(folded(model, "sign lost"), None)).verdict == "different"


class Pair(nn.Module):
    """Two inputs of one shape: to swap them is an error that only the numbers show."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.eval()

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        return {"sum": self.a(left) + self.b(right), "product": self.a(left) * right}


class PairTurned(Pair):
    def forward(self, right: Tensor, left: Tensor) -> dict[str, Tensor]:
        return super().forward(left, right)


class PairRenamed(Pair):
    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        made = super().forward(first, second)
        return made["sum"], made["product"]


class PairSwapped(Pair):
    def forward(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
        return super().forward(second, first)


TWO = (torch.randn(2, 4), torch.randn(2, 4))


@pytest.mark.parametrize(
    ("candidate", "expected"), [(PairTurned, "equal"), (PairRenamed, "equal"), (PairSwapped, "different")]
)
def test_inputs_are_matched_by_name_where_all_agree_and_else_in_order(candidate, expected):
    found = validate_torch(opened(Pair(), *TWO), opened(candidate(), *TWO))
    assert found.verdict == expected
    other = "the outputs have other names; they are compared in their order"
    assert (other in found.notes) == (candidate is PairRenamed)


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["left", "right"], "equal"), (["u", "v"], "equal"), (["right", "left"], "different")],
)
def test_onnx_inputs_are_matched_by_name_where_all_agree_and_else_in_order(tmp_path, names, expected):
    made = to_onnx(Pair(), tmp_path / "m.onnx", *TWO, input_names=names)
    assert validate_torch(opened(Pair(), *TWO), made).verdict == expected
    assert validate_torch(made, opened(Pair(), *TWO)).verdict == expected


@pytest.mark.parametrize("spare", ["in", "out"])
def test_other_counts_are_refused_with_both_lists(tmp_path, spare):
    class One(Pair):
        def forward(self, left: Tensor) -> Tensor:
            return self.a(left)

    class OneOut(Pair):
        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.a(left) + self.b(right)

    if spare == "in":
        candidate, said = opened(One(), TWO[0]), r"there are left, right; the candidate has left$"
    else:
        candidate, said = opened(OneOut(), *TWO), "the models have 2 and 1 outputs"
    with pytest.raises(UsageError, match=said):
        validate_torch(opened(Pair(), *TWO), candidate)


# ---- structure of calls ---------------------------------------------------------------------------------


class Options(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self.eval()

    def forward(self, x: Tensor, *more: Tensor, scale: int = 1, extra: Any = None) -> dict[str, Any]:
        y = self.linear(x) * scale + sum(more)
        return {"y": y, "nested": [y + extra["shift"], None, (y.argmax(-1),)], "count": 3}


def test_nested_keyword_and_constant_arguments():
    x, shift = torch.randn(2, 4), {"shift": torch.randn(4)}
    example = Example((x, torch.randn(2, 4)), {"extra": shift, "scale": 2})
    model = Options()
    program = read_exported(export(model, example))
    found = validate_torch(read_module(model, example), program)
    assert found.verdict == "equal"
    assert [output.name for output in found.outputs] == ["y", "nested.0", "nested.2.0"]
    assert list(found.inputs[0]) == ["x", "more_0", "extra_shift"]
    assert found.notes == ("output 'count' is no tensor; it was not compared",)
    twice = read_module(model, Example(example.args, {**example.kwargs, "scale": 3}))
    assert validate_torch(twice, program).verdict == "different"


def test_the_users_own_inputs_are_the_first_set():
    class Spike(OtherAtThree):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * torch.where(x.max() > 100, self.factor, 1.0)

    x = torch.randn(2, 4)
    pair = opened(Spike(1), x), opened(Spike(2), x)
    assert validate_torch(*pair).verdict == "equal"  # no generated input goes there
    assert validate_torch(*pair, inputs=(x * 1000,)).verdict == "different"
    assert validate_torch(*pair, inputs={"x": (1000 * x).numpy()}).verdict == "different"


def test_inputs_come_from_a_file_too(tmp_path):
    path = tmp_path / "inputs.npz"
    model = ConvNorm()
    np.savez(path, x=image(4).numpy())
    found = validate_torch(opened(model, image()), opened(folded(model), image()), inputs_file=path)
    assert found.verdict == "equal"
    assert found.inputs == ({"x": [4, 3, 8, 8]},)
    np.savez(path, y=image(4).numpy())
    with pytest.raises(UsageError, match="lacks the model's input 'x'"):
        validate_torch(opened(model, image()), opened(model, image()), inputs_file=path)
    np.savez(path, x=image(4).double().numpy())
    with pytest.raises(UsageError, match="is float64, the model wants float32"):
        validate_torch(opened(model, image()), opened(model, image()), inputs_file=path)


def test_shapes_are_enough():
    model = ConvNorm()
    shapes = {"x": ((3, 3, 9, 9), None)}
    pair = read_module(model, None), read_module(folded(model), None)
    found = validate_torch(*pair, shapes=shapes)
    assert found.verdict == "equal"
    assert found.inputs[0] == {"x": [3, 3, 9, 9]}
    assert validate_torch(opened(model, image()), pair[1], shapes=shapes).inputs[0] == {"x": [3, 3, 9, 9]}
    with pytest.raises(UsageError, match="the model has no input 'y'; it has x"):
        validate_torch(opened(model, image()), pair[1], shapes={"y": ((1,), None)})


def test_without_inputs_the_error_says_what_to_type():
    with pytest.raises(UsageError, match="--input x=1x3x224x224"):
        validate_torch(read_module(ConvNorm(), None), read_module(ConvNorm(), None))


def test_integers_stay_in_the_table_and_masks_as_they_are():
    ids = torch.tensor([[1, 49, 3, 0], [2, 2, 7, 8]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    model = Tokens()
    found = validate_torch(opened(model, ids, mask), opened(copy.deepcopy(model), ids, mask))
    assert found.verdict == "equal"
    assert len(found.inputs) == 3
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.table.weight[30] *= -1  # a row that only drawn indices reach
    wide = torch.arange(40).reshape(2, 20) % 5
    pair = [opened(each, wide, torch.ones_like(wide)) for each in (model, wrong)]
    assert validate_torch(*pair).verdict == "different"


def test_integers_without_a_table_stay_between_the_examples_extremes():
    class Pick(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return self.linear(x)[index]

    model, x = Pick().eval(), torch.randn(9, 4)
    found = validate_torch(opened(model, x, torch.tensor([3, 7])), opened(model, x, torch.tensor([3, 7])))
    assert found.verdict == "equal"


# ---- precision ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "expected"),
    # bfloat16 keeps 8 bits: four of its roundings are more than 1 %
    [(torch.float16, "equal"), (torch.bfloat16, "inconclusive"), (torch.float64, "equal")],
)
def test_every_precision_has_its_own_floor(dtype, expected):
    model = ConvNorm().to(dtype)
    x = image().to(dtype)
    found = validate_torch(opened(model, x), opened(folded(model), x))
    assert found.verdict == expected
    (output,) = found.outputs
    assert output.ratio <= 4
    last_bit = torch.finfo(dtype).eps * output.largest
    assert last_bit / 8 < output.noise_floor < 8 * last_bit
    assert validate_torch(opened(model, x), opened(folded(model, "wrong sign"), x)).verdict == "different"


def test_hard_coded_float32_does_not_spoil_the_float64_run():
    model, x = CastingNorm(), torch.randn(2, 16)
    program = export(model, Example((x,)))
    exact = Float64Program(program, torch.device("cpu")).run(Example((x,)))
    assert exact.dtype == torch.float64
    wide, y = copy.deepcopy(model).double(), x.double()
    h = wide.first(y)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + model.eps)
    ramp = torch.arange(64).double() / 64 + torch.tensor(0.1, dtype=torch.float64)
    assert torch.allclose(exact, wide.last(wide.gain * h + ramp), rtol=1e-13, atol=1e-13)
    assert not torch.allclose(exact, wide(y), rtol=1e-9, atol=1e-9)  # .double() alone does not do it
    found = validate_torch(opened(model, x), read_exported(program))
    assert found.verdict == "equal"
    assert found.notes == ()
    assert 1e-8 < found.outputs[0].noise_floor < 1e-5


def test_an_epsilon_that_is_off_by_a_thousandth_is_found():
    x = torch.randn(2, 16)
    found = validate_torch(opened(CastingNorm(1e-2), x), opened(CastingNorm(1.001e-2), x))
    assert found.verdict == "different"


def test_parts_that_export_keeps_apart_are_run_in_float64_too():
    class Regions(ConvNorm):
        def forward(self, x: Tensor) -> Tensor:
            with torch.set_grad_enabled(False):
                y = self.conv(x)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
                z = self.bn(y).to(torch.float32)
            z = torch.cond(x.sum() > 0, lambda a: a + 1, lambda a: a - 1, (z,))
            return z + torch.div(torch.arange(6), 3)

    with torch.enable_grad():
        model = Regions()
        program = export(model, Example((image(),)))
    found = validate_torch(read_exported(program), read_exported(program))
    assert found.notes == ()
    assert found.verdict == "equal"


def test_writing_to_a_converted_tensor_does_not_write_to_the_original():
    class Converted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            z = y.to(torch.float32)
            z += 1
            return y + z

    model, x = Converted().eval().half(), torch.randn(2, 4).half()
    found = validate_torch(opened(model, x), opened(copy.deepcopy(model), x))
    assert found.verdict == "equal"
    assert found.notes == ()
    assert found.outputs[0].noise_floor < 0.1


def test_without_export_the_model_is_its_own_reference():
    class Branching(ConvNorm):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y * 2 if y.sum() > 0 else y

    model = Branching()
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.conv.weight[1] *= 1.01
    pair = opened(model, image()), opened(copy.deepcopy(model), image())
    assert pair[0].exported is None
    found = validate_torch(*pair)
    assert found.verdict == "equal"
    assert any("no float64 run" in note for note in found.notes)
    assert validate_torch(pair[0], opened(wrong, image())).verdict == "different"


def test_a_float64_run_of_something_else_is_no_yardstick(monkeypatch):
    """An export that bakes in what the module decides at run time must not widen the floor."""
    model = ConvNorm()
    wrong = folded(model, "wrong sign")

    def other_export(module: nn.Module, example: Example, **options: Any) -> Any:
        return export(wrong, example, **options)

    monkeypatch.setattr(torch_side, "export", other_export)
    found = validate_torch(opened(model, image()), opened(folded(model), image()))
    assert found.verdict == "equal"
    assert any("do not explain" in note for note in found.notes)
    assert validate_torch(opened(model, image()), opened(wrong, image())).verdict == "different"


def test_the_original_precision_sets_the_last_bit():
    exact, own = np.array([1.0, 2.0]), np.array([1.0, 2.0], np.float32)
    near = own + np.array([2e-7, 0], np.float32)
    for candidate, expected in [(near, "equal"), (own * np.float32(1.0001), "different")]:
        (found,), _ = compare([OutputRuns("y", exact, [own], candidate, np.dtype(np.float32))])
        assert found.verdict == expected
    (found,), _ = compare([OutputRuns("y", exact, [own], exact, np.dtype(np.float32))])
    assert found.verdict == "different"  # float64 is not what the model computes


# ---- what is random, what is changed --------------------------------------------------------------------


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(16, 16)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.linear(x))


@pytest.mark.parametrize("who", ["reference", "candidate"])
def test_dropout_in_training_mode_is_inconclusive(who):
    x = torch.randn(4, 16)
    dropping, quiet = Dropping().train(), Dropping().eval()
    pair = [opened(dropping, x), opened(quiet, x)]
    found = validate_torch(*(pair if who == "reference" else reversed(pair)))
    assert found.verdict == "inconclusive"
    assert found.notes == (
        f"the {who} computes something else each time: it is in training mode (call .eval())",
    )
    assert dropping.training
    assert dropping.drop.training
    assert validate_torch(opened(quiet, x), opened(Dropping().eval(), x)).verdict == "equal"


class Busy(ConvNorm):
    """Writes to attributes and buffers, calls a hook, draws random numbers it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.seen = 0
        self.register_forward_hook(lambda module, args, output: output * 2)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.calls += 1
        torch.rand(3), np.random.rand(), random.random()
        return super().forward(x)


def test_the_users_models_are_left_as_they_were():
    model, candidate = Busy(), Busy()
    candidate.bn.train()
    pair = opened(model, image()), opened(candidate, image())
    before = [copy.deepcopy(each.state_dict()) for each in (model, candidate)]
    hooks = list(model._forward_hooks.items())
    tensors = [(id(t), t.data_ptr(), t._version) for t in (*model.parameters(), *model.buffers())]
    flags = [m.training for m in candidate.modules()]
    rng = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    validate_torch(*pair)
    assert torch.equal(rng[0], torch.get_rng_state())
    assert (rng[1] == np.random.get_state()[1]).all()
    assert rng[2] == random.getstate()
    assert (dtype, precision) == (torch.get_default_dtype(), torch.get_float32_matmul_precision())
    assert torch.is_grad_enabled()
    for each, state in zip((model, candidate), before, strict=True):
        assert all(torch.equal(state[name], tensor) for name, tensor in each.state_dict().items())
        assert each.seen == 0
    assert hooks == list(model._forward_hooks.items())
    assert tensors == [(id(t), t.data_ptr(), t._version) for t in (*model.parameters(), *model.buffers())]
    assert flags == [m.training for m in candidate.modules()]


def test_hooks_are_part_of_the_function():
    plain, hooked = ConvNorm(), ConvNorm()
    hooked.register_forward_hook(lambda module, args, output: output * 1.01)
    assert validate_torch(opened(hooked, image()), opened(hooked, image())).verdict == "equal"
    assert validate_torch(opened(plain, image()), opened(hooked, image())).verdict == "different"


def test_old_weight_norm_can_be_copied():
    with undisturbed():
        conv = torch.nn.utils.weight_norm(nn.Conv2d(3, 4, 3))
    conv(image())
    assert validate_torch(opened(conv, image()), opened(conv, image())).verdict == "equal"


def test_a_model_that_raises_is_refused():
    class Raising(ConvNorm):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no such thing\nand more")

    good, bad = opened(ConvNorm(), image()), opened(Raising(), image())
    with pytest.raises(RuntimeRefused, match=r"PyTorch refuses the candidate: ValueError: no such thing$"):
        validate_torch(good, bad)
    with pytest.raises(RuntimeRefused, match=r"runs the reference on no input.*no such thing$"):
        validate_torch(bad, good)


def test_weights_that_were_never_loaded_are_refused():
    with pytest.raises(UsageError, match="not loaded"):
        validate_torch(read_module(ConvNorm().to("meta"), Example((image(),))), opened(ConvNorm(), image()))


# ---- devices --------------------------------------------------------------------------------------------


def test_an_unknown_device_is_a_usage_error():
    with pytest.raises(UsageError, match="choose cpu or cuda"):
        validate_torch(opened(ConvNorm(), image()), opened(ConvNorm(), image()), device="tpu")


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU here")
def test_cuda_without_a_gpu_is_said():
    with pytest.raises(BackendUnavailable, match="sees no CUDA device") as error:
        validate_torch(opened(ConvNorm(), image()), opened(ConvNorm(), image()), device="cuda")
    assert error.value.exit_code == 4


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA device: torch.cuda.is_available() is False")
def test_cuda_is_used_without_tf32():
    model = ConvNorm()
    torch.backends.cudnn.allow_tf32 = True
    found = validate_torch(opened(model, image()), opened(folded(model), image()), device="cuda")
    assert found.verdict == "equal"
    assert found.providers == {"requested": "cuda", "effective": ["torch cuda"]}
    assert "TF32 off" in found.notes
    assert found.outputs[0].max_rel < 1e-5
    assert torch.backends.cudnn.allow_tf32
    assert next(model.parameters()).device.type == "cpu"
    wrong = opened(folded(model, "wrong sign"), image())
    assert validate_torch(opened(model, image()), wrong, device="cuda").verdict == "different"


# ---- real architectures ---------------------------------------------------------------------------------

SOME = ["resnet", "bert", "t5"]
LONG = ["mobilenet_v2", "convnext", "levit", "llama", "wav2vec2", "detr"]


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(a, id=a.name, marks=[pytest.mark.long] if a.name in LONG else [])
        for a in ARCHITECTURES
        if a.name in {*SOME, *LONG}
    ],
)
def test_a_transformers_model_equals_its_program(architecture: Architecture):
    module, example = architecture.make(), Example(kwargs=architecture.inputs())
    opened_module = read_module(module, example)
    found = validate_torch(opened_module, read_exported(export(module, example)))
    assert found.verdict == "equal"
    assert not any("float64" in note for note in found.notes)
    assert all(output.noise_floor < 1e-3 * output.largest for output in found.outputs)
    wrong = architecture.make()
    weight = next(part.weight for part in wrong.modules() if isinstance(part, nn.Linear))
    with torch.no_grad():
        weight[: len(weight) // 2] *= 1.01
    assert validate_torch(opened_module, read_module(wrong, example)).verdict == "different"


def test_an_onnx_side_tells_a_module_what_to_be_called_with(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    path = tmp_path / "module.onnx"
    normtool.convert(module, torch.randn(2, 3, 8, 8), validate=False).save(path)
    assert normtool.validate(module, path).verdict == "equal"
    assert normtool.validate(path, module).verdict == "equal"


def test_two_modules_that_say_nothing_are_asked_for_inputs():
    module = nn.Conv2d(3, 4, 3)
    with pytest.raises(UsageError, match="--input input=1x3x224x224"):
        normtool.validate(module, module)
