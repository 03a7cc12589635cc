from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from momconv.errors import UsageError
from momconv.recipe import (
    KEYS,
    DataRecipe,
    ModelRecipe,
    MomentumRecipe,
    Recipe,
    TrainRecipe,
    dump_recipe,
    load_recipe,
    recall_recipe,
)
from momconv.vocabulary import OPTIMIZERS

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
Write = Callable[[str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a recipe file and gives its path."""

    def write(text: str | bytes) -> Path:
        path = tmp_path / "cfg.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def refusal(path: Path | None, *overrides: str) -> UsageError:
    with pytest.raises(UsageError) as refused:
        load_recipe(path, overrides)
    return refused.value


def value(recipe: Recipe, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(recipe, section), name)


# Reading


def test_without_a_file_the_recipe_is_the_defaults() -> None:
    assert load_recipe(None) == Recipe()


@pytest.mark.parametrize("text", ["", "# nothing\n", "train:\n", "train: {}\n", "---\n"])
def test_an_empty_file_or_section_leaves_the_defaults(write: Write, text: str) -> None:
    assert load_recipe(write(text)) == Recipe()


def test_an_override_beats_the_file_and_the_last_override_wins(write: Write) -> None:
    path = write("train:\n  epochs: 3\n  lr: 0.5\n")
    recipe = load_recipe(path, ["train.epochs=4", "train.epochs=5"])
    assert recipe == Recipe(train=TrainRecipe(epochs=5, lr=0.5))


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("train.lr", "1e-3", 0.001),  # text to YAML 1.1
        ("train.lr", "null", None),
        ("train.epochs", "010", 10),  # eight to YAML 1.1
        ("train.micro_batch", "8", 8),
        ("train.micro_batch", "auto", "auto"),
        ("train.memory", "3GiB", "3GiB"),
        ("train.memory", "1024", "1024"),
        ("train.device", "0", "0"),
        ("model.name", "no", "no"),  # false to YAML 1.1
        ("model.name", "'null'", "null"),
        ("model.weights", "2026-01-01", "2026-01-01"),  # a date to YAML 1.1
        ("momentum.gain", "no", False),
        ("momentum.stages", "[layer3, 4]", ["layer3", "4"]),
        ("data.path", "a b/é", Path("a b/é")),
        ("data.path", "~", None),
    ],
)
def test_the_key_decides_how_its_value_is_read(
    write: Write, key: str, text: str, expected: object
) -> None:
    section, name = key.split(".")
    from_file = value(load_recipe(write(f"{section}:\n  {name}: {text}\n")), key)
    from_override = value(load_recipe(None, [f"{key}={text}"]), key)
    assert from_file == from_override == expected
    assert type(from_file) is type(from_override) is type(expected)


def test_an_override_with_nothing_behind_it_is_null() -> None:
    assert load_recipe(None, ["train.memory=3GiB", "train.memory="]).train.memory is None


def test_the_environment_beats_the_file_and_an_override_beats_it(write: Write) -> None:
    path = write("train:\n  epochs: 3\n  lr: 0.5\n  seed: 1\n")
    environment = {"MOMCONV_TRAIN__EPOCHS": "4", "MOMCONV_TRAIN__LR": "1e-3", "PATH": "x"}
    environment |= {"MOMCONV_CACHE": "/x", "MOMCONV_TRAIN__FREEZE": "[stem, layer1]"}
    recipe = load_recipe(path, ["train.epochs=5"], environment)
    train = TrainRecipe(epochs=5, lr=0.001, seed=1, freeze=["stem", "layer1"])
    assert recipe == Recipe(train=train)


def test_a_variable_with_one_underscore_is_refused() -> None:
    with pytest.raises(UsageError, match="MOMCONV_TRAIN_BATCH_SIZE sets nothing") as caught:
        load_recipe(None, environment={"MOMCONV_TRAIN_BATCH_SIZE": "8"})
    assert caught.value.fix == "MOMCONV_TRAIN__BATCH_SIZE=8"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("TRAIN__EPOHCS", "3", "unknown key train.epohcs — did you mean train.epochs?"),
        ("TRAIN__EPOCHS", "many", "train.epochs: 'many' is not an integer ≥ 1"),
        ("TRAIN__FREEZE", "[", "train.freeze: not valid YAML: "),
    ],
)
def test_a_wrong_variable_is_named(name: str, text: str, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        load_recipe(None, environment={f"MOMCONV_{name}": text})
    assert message in refused.value.message


def test_an_override_may_set_part_of_a_section() -> None:
    recipe = load_recipe(None, ["train.lr=0.5", "train={epochs: 3}"])
    assert recipe == Recipe(train=TrainRecipe(epochs=3, lr=0.5))


@pytest.mark.parametrize(
    ("overrides", "lr"),
    [
        ([], 0.01),
        (["train.batch_size=64"], 0.02),
        (["train.batch_size=64", "train.lr=0.5"], 0.5),
        (["train.batch_size=64", "train.optimizer=adamw"], 1e-4),
    ],
)
def test_the_default_learning_rate_follows_the_batch_for_sgd_alone(
    overrides: list[str], lr: float
) -> None:
    assert load_recipe(None, overrides).train.resolved_lr == lr


def test_a_recipe_cannot_be_changed_or_given_more_keys() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Recipe().train.epochs = 3
    with pytest.raises(ValidationError, match="epohcs"):
        TrainRecipe.model_validate({"epohcs": 3})


# Refusing


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  epohcs: 3", ":2: unknown key train.epohcs — did you mean train.epochs?"),
        ("epochs: 3", ":1: unknown key epochs — did you mean train.epochs?"),
        ("trian:\n  lr: 3", ":2: unknown key trian.lr — did you mean train.lr?"),
        ("# x\nfoo: 3", ":2: unknown key foo\nsections: model, momentum, data, train, log"),
        ("? [a]\n: 1", ":1: unknown key ['a']\nsections: model, momentum, data, train, log"),
        (
            "model: resnet50",
            ":1: model is a section, not a value\nits keys: name, arguments, weights, from_file",
        ),
    ],
)
def test_an_unknown_key_is_placed_and_the_nearest_is_offered(
    write: Write, text: str, message: str
) -> None:
    path = write(text)
    error = refusal(path)
    assert error.message == f"{path}{message}"
    assert error.kind == "usage.unknown_key"


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("train.epochs", "abc", "'abc' is not an integer ≥ 1"),
        ("train.epochs", "1.5", "'1.5' is not an integer ≥ 1"),
        ("train.epochs", "0", "'0' is not an integer ≥ 1"),
        ("train.epochs", "~", "null is not an integer ≥ 1"),
        ("train.micro_batch", "lots", "'lots' is not an integer ≥ 1 or auto"),
        ("train.optimizer", "adam", f"'adam' is not {' or '.join(OPTIMIZERS)}"),
        ("data.std", "0", "'0' is not three numbers > 0 like 0.5,0.5,0.5 or null"),
        ("train.lr", "nan", "'nan' is not a number > 0 or auto or null"),
        ("train.lr", "inf", "'inf' is not a number > 0 or auto or null"),
        ("train.memory", "much", "'much' is not an amount of memory like 3GiB or null"),
        ("momentum.gamma", "1.01", "'1.01' is not a number ≥ 0 and ≤ 1"),
        ("momentum.gain", "maybe", "'maybe' is not true or false"),
        ("momentum.calibrate", "often", "'often' is not true or false"),
        ("momentum.anneal", "-1", "'-1' is not a number ≥ 0"),
        ("momentum.anneal", "inf", "'inf' is not a number ≥ 0"),
        ("momentum.stages", "layer3", "'layer3' is not auto or all or a list of names"),
        ("data.resolution", "15", "'15' is not an integer ≥ 16 or null"),
        ("data.path", "[a, b]", "['a', 'b'] is not a path or null"),
    ],
)
def test_a_bad_value_is_shown_with_its_place_and_what_is_allowed(
    write: Write, key: str, text: str, message: str
) -> None:
    section, name = key.split(".")
    path = write(f"{section}:\n\n  {name}: {text}\n")
    assert refusal(path).message == f"{path}:3: {key}: {message}"
    assert refusal(None, f"{key}={text}").message == f"{key}: {message}"
    assert refusal(path).kind == "usage.bad_value"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["momentum.gamma=0"], "γ rises from 0.1, and momentum.gamma is 0"),
        (["momentum.gamma=0.1"], "γ rises from 0.1, and momentum.gamma is 0.1"),
        (["train.epochs=1"], "1.5 epochs are more than train.epochs, which is 1"),
        (["model.from_file=a"], "the network in model.from_file has its γ already"),
    ],
)
def test_annealing_that_cannot_be_is_refused(changes: list[str], message: str) -> None:
    error = refusal(None, "momentum.anneal=1.5", *changes)
    assert error.message == f"momentum.anneal: {message}"
    assert error.kind == "usage.bad_annealing"
    assert load_recipe(None, changes).momentum.anneal == 0


@pytest.mark.parametrize(
    ("change", "fix"),
    [
        ("momentum.gamma=0.5", "--set momentum.gamma=0.9"),
        ("momentum.stages=all", "--set momentum.stages=auto"),
        ("momentum.velocity=residual", "--set momentum.velocity=zero"),
        ("momentum.gain=false", "--set momentum.gain=true"),
    ],
)
def test_a_network_in_a_file_is_converted_already(change: str, fix: str) -> None:
    changes = ["model.from_file=mine.safetensors", change]
    error = refusal(None, *changes)
    assert error.message.endswith("but the network in model.from_file is converted")
    assert error.fix == fix
    assert load_recipe(None, [*changes, fix.removeprefix("--set ")])


@pytest.mark.parametrize("key", KEYS)
def test_every_key_can_say_what_it_allows(key: str) -> None:
    assert refusal(None, f"{key}={{a: 1}}").message.startswith(f"{key}: {{'a': '1'}} is not ")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("train:\n  lr: 1: 2", ":2"),
        ("train:\n  lr: [1", ":2"),
        ("train:\n  lr: !!python/name:os.getcwd", ":2"),
        ("train: {}\n---\ndata: {}", ":2"),
        ("train: &a\n  lr: [*a]", ":2"),
        ("train: \x00", ":1"),
        ("# é\ntrain:\n  lr: \x00", ":3"),
        ("train:\n  lr: \x7f", ":2"),
        (b"train:\n  \xff", ":2"),
        ("train:\n  lr: [1]\n  x: " + "[" * 5000, ":3"),
        ("train:\n  lr: " + "{a: " * 5000, ":2"),
    ],
)
def test_what_is_not_yaml_is_placed(write: Write, text: str | bytes, place: str) -> None:
    path = write(text)
    error = refusal(path)
    assert error.message.startswith(f"{path}{place}: not valid YAML: ")
    assert "\n" not in error.message
    assert error.kind == "usage.bad_yaml"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!!float quick", "'quick' is not !!float"),
        ("!!int 1.5", "'1.5' is not !!int"),
        ("!!int " + "9" * 100_000, " is not !!int"),
        ("!!bool maybe", "'maybe' is not !!bool"),
        ("!!null none", "'none' is not !!null"),
        ("!!timestamp yesterday", "no key has a value of !!timestamp"),
        ("!!binary '*'", "no key has a value of !!binary"),
        ("!!set {a, b}", "no key has a value of !!set"),
        ("!!omap [a: b]", "no key has a value of !!omap"),
        ("!!merge a", "no key has a value of !!merge"),
        ("!!python/object/apply:os.getcwd []", "no key has a value of !!python/object/apply:"),
        ("!mine a", "no key has a value of !mine"),
        ("!" + "x" * 100_000 + " a", "no key has a value of !xxx"),
        ("!!int [a]", "expected a scalar node"),
        ("!!seq a", "expected a sequence node"),
        ("[stem, !!float quick]", "'quick' is not !!float"),
    ],
)
@pytest.mark.parametrize("key", ["model.name", "train.lr", "train.freeze"])
def test_a_tag_that_its_value_does_not_fit_is_placed(
    write: Write, key: str, text: str, message: str
) -> None:
    section, name = key.split(".")
    path = write(f"{section}:\n  {name}: {text}\n")
    error = refusal(path)
    assert error.message.startswith(f"{path}:2: not valid YAML: ")
    assert message in error.message
    assert len(error.message) < 1000
    assert message in refusal(None, f"{key}={text}").message


@pytest.mark.parametrize("tag", ["!!set", "!!omap", "!!str", "!mine", "!!python/dict"])
def test_a_section_or_recipe_with_another_tag_is_placed(write: Write, tag: str) -> None:
    assert ":1: not valid YAML: " in refusal(write(f"train: {tag} {{lr: 0.5}}")).message
    assert ":1: not valid YAML: " in refusal(write(f"{tag} {{train: {{lr: 0.5}}}}")).message


def test_a_tag_that_fits_changes_nothing(write: Write) -> None:
    text = "train: !!map {lr: !!float 1e-3, epochs: !!int 5, compile: !!bool yes, clip: !!null ~}"
    path = write(f"{text}\nmodel: {{name: !!str no, arguments: !!seq [a=1]}}")
    recipe = load_recipe(path, ["model.name=no", "model.arguments=[a=1]"])
    assert recipe.train == TrainRecipe(lr=0.001, epochs=5, compile=True)
    assert recipe.model == ModelRecipe(name="no", arguments=["a=1"])


def nest(levels: int) -> str:
    """What would be 8 ** levels texts, written out."""
    text = '&n0 ["x", "x"]'
    for level in range(1, levels):
        text = f"&n{level} [{text}{f', *n{level - 1}' * 7}]"
    return text


@pytest.mark.parametrize(
    "text",
    [
        "model:\n  name: {}",
        "model:\n  arguments: {}",
        "model:\n  ? {}\n  : 1",
        "train:\n  lr: {}",
        "train:\n  freeze: {}",
        "train:\n  {{a: {}}}",
        "{{\n  ? {}\n  : 1}}",
        "data:\n  path: {}",
        "#\n{}: 1",
    ],
)
@pytest.mark.parametrize("value", [nest(6), nest(40), "x" * 100_000, "9" * 100_000])
def test_a_value_without_end_is_refused_in_a_few_words(write: Write, text: str, value: str) -> None:
    path = write(text.format(value))
    error = refusal(path)
    assert error.message.startswith(f"{path}:2: ")
    assert len(str(error)) < 500


@pytest.mark.parametrize("key", KEYS)
def test_no_value_makes_a_long_message(key: str) -> None:
    values = [nest(40), f"[{'[x], ' * 500}]"]
    if key != "train.device":  # whose names depend on the machine
        values.append("x" * 100_000)
    for value in values:
        assert len(str(refusal(None, f"{key}={value}"))) < 500


@pytest.mark.parametrize("key", ["train.epochs", "train.batch_size", "data.workers"])
def test_a_number_too_large_to_count_with_is_refused(key: str) -> None:
    assert refusal(None, f"{key}=1000000001").message.endswith(" up to 1000000000")
    assert load_recipe(None, [f"{key}=1000000000"])


HOME = ["model.weights", "model.from_file", "data.path", "data.train_dir", "data.val_dir"]


@pytest.mark.parametrize("key", [*HOME, "model.name"])
def test_a_tilde_is_the_home_folder_wherever_a_path_comes_from(
    write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    section, name = key.split(".")
    for text, expected in (("~/a b", tmp_path / "a b"), ("'~'", tmp_path), ("a/~", Path("a/~"))):
        variable = {f"MOMCONV_{section}__{name}".upper(): text}
        for recipe in (
            load_recipe(write(f"{section}:\n  {name}: {text}")),
            load_recipe(None, [f"{key}={text}"]),
            load_recipe(None, environment=variable),
        ):
            assert Path(str(value(recipe, key))) == expected


@pytest.mark.parametrize("text", ['"\\0"', '"\\ud800"', "x" * 256, "aa/" * 2048])
def test_what_cannot_be_a_path_is_refused(text: str) -> None:
    for key in HOME:
        assert " is not a " in refusal(None, f"{key}={text}").message


def test_a_recipe_may_be_in_utf_16_or_have_a_mark(write: Write) -> None:
    for codec in ("utf-8-sig", "utf-16"):
        assert load_recipe(write("train:\n  lr: 0.5\n".encode(codec))).train.lr == 0.5


def test_an_override_that_is_not_yaml_is_named() -> None:
    assert refusal(None, "train.lr=[1").message.startswith("train.lr: not valid YAML: ")


@pytest.mark.parametrize("override", ["train.epochs", "=3", ""])
def test_an_override_without_a_key_or_a_value_shows_how_to_write_one(override: str) -> None:
    error = refusal(None, override)
    assert error.message == f"{override!r} does not set anything"
    assert error.fix == "--set train.epochs=5"


def test_a_file_that_is_not_a_mapping_is_not_a_recipe(write: Write) -> None:
    path = write("- train\n")
    expected = f"{path} is not a recipe: it has none of model, momentum, data, train, log"
    assert refusal(path).message == expected


def test_a_key_given_twice_in_an_override_is_refused() -> None:
    assert refusal(None, "train={lr: 1, lr: 2}").message == "train.lr is given twice"


@pytest.mark.parametrize("text", ["train:\n  lr: 1\n  lr: 2", "train: {lr: 1}\n\ntrain: {lr: 2}"])
def test_a_key_given_twice_is_refused(write: Write, text: str) -> None:
    path = write(text)
    assert refusal(path).message == f"{path}:3: train.lr is given twice"


@pytest.mark.parametrize("wrong", ["cgf.yaml", "cfg.yaml/deeper", "cfg.yml"])
def test_a_missing_file_names_the_closest_existing(write: Write, wrong: str) -> None:
    path = write("")
    error = refusal(path.parent / wrong)
    assert error.message == f"recipe does not exist: {path.parent / wrong}"
    assert error.fix == f"closest existing path is {path}"


def test_a_missing_file_with_nothing_like_it_offers_nothing(tmp_path: Path) -> None:
    assert refusal(tmp_path / "cfg.yaml").fix is None


def test_a_link_to_nowhere_is_not_offered_as_existing(tmp_path: Path) -> None:
    (tmp_path / "cfg.yaml").symlink_to("nowhere")
    assert refusal(tmp_path / "cfg.yaml").fix is None


def test_a_folder_is_not_a_recipe(tmp_path: Path) -> None:
    assert refusal(tmp_path).message == f"cannot read recipe {tmp_path}: Is a directory"


# Writing

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
unit, below_one = st.floats(0, 1), st.floats(0, 1, exclude_max=True)
positive = st.floats(0, exclude_min=True, allow_infinity=False)
paths = st.none() | texts.map(Path)
seeds, counts = st.integers(0, 2**32 - 1), st.integers(1, 10**9)
recipes = st.builds(
    Recipe,
    model=st.builds(ModelRecipe, name=texts, weights=texts),
    momentum=st.builds(
        MomentumRecipe,
        gamma=unit,
        stages=st.just("auto") | st.lists(st.text()),
        velocity=st.sampled_from(["zero", "residual"]),
        gain=st.booleans(),
        calibrate=st.booleans(),
        strategy=st.sampled_from(["store", "checkpoint", "momentum"]),
    ),
    data=st.builds(
        DataRecipe,
        path=paths,
        resolution=st.none() | st.integers(16, 10**9),
        val_frac=below_one,
        split_seed=seeds,
        max_bad_fraction=unit,
        workers=st.just("auto") | st.integers(0, 10**9),
        flip=st.booleans(),
    ),
    train=st.builds(
        TrainRecipe,
        epochs=counts,
        batch_size=counts,
        micro_batch=st.just("auto") | counts,
        optimizer=st.sampled_from([*OPTIMIZERS]),
        lr=st.none() | st.just("auto") | positive,
        freeze=st.lists(st.text()),
        momentum=below_one,
        weight_decay=positive,
        warmup_epochs=positive,
        label_smoothing=below_one,
        precision=st.sampled_from(["auto", "fp32", "bf16", "fp16"]),
        seed=seeds,
        memory=st.sampled_from([None, "3GiB", "512", " 1.5 mb"]),
        device=st.text(),
    ),
)


@example(recipe=Recipe(model=ModelRecipe(weights="\x85")))
@example(recipe=Recipe(momentum=MomentumRecipe(calibrate=False, anneal=2.5)))
@example(recipe=Recipe(model=ModelRecipe(from_file=Path("mine.safetensors"))))
@settings(deadline=None)
@given(recipe=recipes)
def test_a_written_recipe_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, recipe: Recipe
) -> None:
    path = tmp_path_factory.getbasetemp() / "written.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert recall_recipe(path) == recipe


def test_a_written_recipe_shows_every_key() -> None:
    written = dump_recipe(Recipe())
    assert all(f"  {key.partition('.')[2]}: " in written for key in KEYS)
    assert written.startswith("model:\n  name: resnet152\n  arguments: []\n  weights: DEFAULT\n")


@pytest.mark.parametrize(
    ("name", "overrides", "missing"),
    [
        ("mine.py:make", [], "--network mine.py:make --arg depth=3"),
        ("mine.py:make", ["model.arguments=[]"], "--network mine.py:make"),
        ("mine.py:make", ["model.name=mine.py:make"], "--arg depth=3"),
        ("timm:resnet26", [], "--arg depth=3"),  # of which some are files to be unpickled
    ],
)
def test_a_function_in_a_file_is_to_be_named_again(
    write: Write, name: str, overrides: list[str], missing: str
) -> None:
    path = write(f"model:\n  name: {name}\n  arguments: [depth=3]\n")
    error = refusal(path, *overrides)
    assert "momconv runs no code because of what a file says" in error.message
    assert error.fix == missing
    again = ["model.name=mine.py:make", "model.arguments=[depth=4]"]
    assert load_recipe(path, again).model.arguments == ["depth=4"]


# The recipes that come with momconv


def test_every_recipe_loads_and_is_in_the_table() -> None:
    found = sorted(RECIPES.rglob("*.yaml"))
    names = [path.name for path in found]
    assert names == ["hymenoptera.yaml", "three-gib.yaml", "vit-l-3gib.yaml"]
    table = (RECIPES / "README.md").read_text(encoding="utf-8")
    for path in found:
        load_recipe(path)
        assert f"]({path.relative_to(RECIPES)})" in table


def test_every_key_is_in_the_documentation() -> None:
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    assert [key for key in KEYS if f"`{key}`" not in text] == []


def test_the_hymenoptera_recipe_is_the_paper_s_at_3_gib() -> None:
    recipe = load_recipe(RECIPES / "hymenoptera.yaml", ["model.weights=none"])
    assert (recipe.model.name, recipe.model.weights) == ("resnet152", "none")
    assert (recipe.data.resolution, recipe.train.memory) == (500, "3GiB")
    assert recipe.momentum.gamma == 0.9
