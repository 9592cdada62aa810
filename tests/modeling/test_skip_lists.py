"""Lists of layers that a quantizer is to leave as they are: by transformers' own rule, which differs by version."""

import sys

import pytest
from support.tiny_factored import ONE_LAYOUT, VERSION
from transformers import BitsAndBytesConfig

PATHS = [
    f"gpt_neox.layers.{n}.{name}" for n in (0, 1, 11) for name in ("attention.query_key_value", "mlp.dense_4h_to_h")
]


def skipped(path, names):
    """Whether the installed transformers leaves the layer of that path as it is."""
    if VERSION < (5,):
        return any(name + "." in path or name == path for name in names) or path.rpartition(".")[2] in names
    from transformers.quantizers.quantizers_utils import should_convert_module

    return not should_convert_module(path, names)


@ONE_LAYOUT
@pytest.mark.parametrize("inner", [("down", "up"), ("query.down", "query.up", "key", "value.down", "value.up")])
@pytest.mark.parametrize(
    ("names", "named"),
    [
        (["query_key_value"], PATHS[::2]),
        (["attention.query_key_value", "lm_head"], PATHS[::2]),
        (["gpt_neox.layers.1.mlp.dense_4h_to_h"], PATHS[3:4]),
        (["dense_4h_to_h", "gpt_neox.layers.11.attention.query_key_value"], [PATHS[1], *PATHS[3:]]),
        (["lm_head"], []),
        ([r".*\.mlp\..*_h$"], PATHS[1::2] if VERSION >= (5,) else []),  # transformers 4 takes names only
    ],
    ids=str,
)
@pytest.mark.parametrize("field", ["llm_int8_skip_modules", "modules_to_not_convert", "skip_modules"])
def test_what_names_the_layer_names_its_factors(model, names, named, inner, field):
    """Whole or split, and nothing else: neither another layer nor half of one."""
    extended = sys.modules[type(model).__module__]._skipping_factors({field: names, "other": 1})
    assert extended.pop("other") == 1
    for path in PATHS:
        assert {skipped(f"{path}.{part}", extended[field]) for part in inner} == {path in named}
    assert skipped("lm_head", extended[field]) == ("lm_head" in names)


@ONE_LAYOUT
def test_settings_of_the_caller_stay_as_they_are(model):
    extend = sys.modules[type(model).__module__]._skipping_factors
    settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["dense"])
    assert extend(settings).llm_int8_skip_modules[:-1] == settings.llm_int8_skip_modules == ["dense"]
    assert extend({"bits": 4}) == {"bits": 4}
    assert extend(extend(settings)).llm_int8_skip_modules.count("dense") == 1
