import normtool
from tests import zoo


def test_fold():
    model = zoo.conv_bn()
    result = normtool.fold(model)
    assert result.validation.verdict == "equal"
    assert zoo.op_types(result.model) == ["Conv", "Relu"]
    assert 0 < zoo.relative_error(zoo.run(model), zoo.run(result.model)) < 1e-5
