"""Claims: the files of conf/claims, what makes one invalid, and that each can be tested by its study."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from helpers import REPOSITORY, config
from hydra.utils import instantiate
from omegaconf import OmegaConf

from alexnet_pl.cli.claims import main
from alexnet_pl.runtime.errors import ConfigError
from alexnet_pl.studies.claims import SCALES, Claim, load_claim, load_claims
from alexnet_pl.studies.store import Study

CLAIMS = REPOSITORY / "conf" / "claims"

LEDGER = load_claims(CLAIMS)

VALID = {
    "statement": "A is better than B.", "source": "C", "section": "1",
    "published": {"text": "−1 point", "value": -1.0, "direction": "lower"}, "stands_in": None,
    "study": {"experiment": "dropout", "overrides": []}, "test": "difference",
    "contrast": {"factor": "model.dropout", "base": 0, "level": 0.5}, "measure": "test/error", "margin": 0.5,
    "seeds": {"lab": 5, "full": 3},
    "pilot": {"scale": None, "seeds": None, "std": None, "to_detect": None, "to_exclude": None},
}  # fmt: skip


def written(tmp_path: Path, changes: dict, name: str = "a") -> Path:
    """Write a valid claim with some keys changed: ``{"published.value": 3}``; a value of ... removes the key."""
    content = yaml.safe_load(yaml.safe_dump(VALID))
    for dotted, value in changes.items():
        *sections, key = dotted.split(".")
        place = content
        for section in sections:
            place = place[section]
        if value is ...:
            del place[key]
        else:
            place[key] = value
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"statement": ""}, "statement= is invalid: expected text"),
        ({"margin": -0.5}, "margin=-0.5 is invalid: expected a number above 0"),
        ({"margin": ...}, "margin not found"),
        ({"published.direction": "less"}, "published.direction=less is invalid: expected one of: lower, higher"),
        ({"published.value": "x"}, "published.value=x is invalid: expected a number or null"),
        ({"published.span": [-2, -1.5]}, "published.span=[-2, -1.5] is invalid: expected two numbers on one"),
        ({"published.span": [-2, 1]}, "published.span=[-2, 1] is invalid: expected two numbers on one side"),
        ({"published.span": [-float("inf"), -0.5]}, "published.span=[-inf, -0.5] is invalid: expected two numbers"),
        ({"published.span": -1}, "published.span=-1 is invalid: expected two numbers"),
        ({"published.value": None, "published.span": [-2, 1]}, "published.span=[-2, 1] is invalid: expected two num"),
        ({"published": 3}, "published=3 is invalid: expected a mapping"),
        ({"test": "guess"}, "test=guess is invalid: expected one of: difference, ratio, within, level"),
        ({"measure": "test/eror"}, "measure=test/eror is invalid: expected epochs_to"),
        ({"measure": "epochs_to(val/error, 0.4)"}, "is invalid: expected epochs_to(…) if test=ratio, and only then"),
        ({"test": "ratio"}, "margin=0.5 is invalid: expected a ratio above 1"),
        ({"test": "ratio", "margin": 2, "published.value": 0}, "published.value=0 is invalid: expected a ratio above"),
        ({"test": "level", "contrast": {}, "published.value": None}, "published.value=null is invalid"),
        ({"test": "within"}, "contrast.base is not a key of a claim"),
        ({"contrast.level": ...}, "contrast.level not found"),
        ({"contrast.level": ["a", "b"]}, "is invalid: expected one level: a mean over several would hide"),
        ({"seeds": {}}, "seeds=nothing is invalid"),
        ({"seeds.lab": 1}, "seeds.lab=1 is invalid: expected a whole number ≥ 2"),
        ({"seeds": {"own": 3, "lab": 2}}, "seeds=lab, own is invalid"),
        ({"pilot.std": -1}, "pilot.std=-1 is invalid"),
        ({"study.overrides": "x=1"}, "study.overrides=x=1 is invalid: expected a list of text"),
        ({"margn": 0.5}, "margn is not a key of a claim. Did you mean margin?"),
        ({"study.seed": 1}, "study.seed is not a key of a claim"),
    ],
)  # fmt: skip
def test_an_invalid_claim_is_refused_in_one_line(tmp_path, changes, message):
    path = written(tmp_path, changes)
    with pytest.raises(ConfigError, match=re.escape(f"{path}: ") + ".*" + re.escape(message)) as error:
        load_claim(path)
    assert "\n" not in str(error.value)


def test_a_broken_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "a.yaml").write_text("statement: [", encoding="utf-8")
    with pytest.raises(ConfigError, match="is corrupt"):
        load_claims(tmp_path)
    with pytest.raises(ConfigError, match="has no claims"):
        load_claims(tmp_path / "none")
    with pytest.raises(ConfigError, match="claim lrn_alexnt not found. Did you mean lrn_alexnet?"):
        load_claims(CLAIMS, ["lrn_alexnt"])


def test_levels_are_compared_as_the_study_shows_them(tmp_path):
    claim = load_claim(written(tmp_path, {"contrast": {"factor": "f", "base": None, "level": 2, "where": {"g": True}}}))
    assert (claim.contrast.base, claim.contrast.level, dict(claim.contrast.where)) == (
        "None",
        "2",
        {"g": "True"},
    )
    assert claim.study_at("lab") == "dropout-lab"
    other = load_claim(written(tmp_path, {"study.overrides": ["optimizer.lr=0.1"], "seeds": {"own": 3}}, "b"))
    assert other.study_at("own") == "dropout-optimizer.lr_0.1"
    assert (claim.scale_for("lab"), other.scale_for("lab")) == ("lab", "own")


def swept(experiment: str) -> dict[str, object]:
    """Return what a preset varies, with what it inherits from other presets."""
    preset = yaml.safe_load((REPOSITORY / "conf/experiment" / f"{experiment}.yaml").read_text(encoding="utf-8"))
    params: dict[str, object] = {}
    for parent in preset.get("defaults", []):
        if isinstance(parent, str) and parent != "_self_":
            params |= swept(parent)
    return params | (preset.get("hydra", {}).get("sweeper", {}).get("params") or {})


@pytest.mark.parametrize("claim", LEDGER, ids=lambda claim: claim.id)
def test_each_claim_can_be_tested_by_its_study(claim: Claim):
    """Its preset exists and varies the factor between the levels that are compared."""
    params = swept(claim.experiment)
    cfg = config(f"experiment={claim.experiment}", *claim.overrides)
    if claim.contrast.factor is not None:
        levels = [str(yaml.safe_load(value)) for value in str(params[claim.contrast.factor]).split(",")]
        assert {claim.contrast.base, claim.contrast.level} <= set(levels)
    if "final" in claim.measure or "gap" in claim.measure:
        assert cfg.final_evaluation
    if "ten_crop" in claim.measure:
        assert cfg.data.test_crops == 10
    if claim.test == "level":
        assert cfg.trainer.max_epochs == 30
    assert not (claim.stands_in is None and "ImageNet" in claim.statement)


COMPARED = sorted({(each.experiment, each.overrides, each.contrast.factor) for each in LEDGER if each.contrast.factor})


@pytest.mark.parametrize(("experiment", "overrides", "factor"), COMPARED)
def test_the_levels_that_claims_compare_are_different_networks_or_recipes(experiment, overrides, factor):
    """With one group, AlexNet without conv3 is AlexNet without conv4, trained twice under two names."""

    def trained(level: str, scale: str) -> str:
        varied = f"{factor}={'null' if level == 'None' else level}"
        cfg = config(f"experiment={experiment}", f"scale={scale}", *overrides, varied)
        with torch.device("meta"):
            layers = [str(layer) for layer in instantiate(cfg.model).modules() if not [*layer.children()]]
        rest = OmegaConf.to_container(cfg, resolve=True)
        for key in ("model", factor, "study"):
            rest.pop(key, None)
        return str((layers, rest))

    together = [each.contrast for each in LEDGER if (each.experiment, each.overrides) == (experiment, overrides)]
    levels = {name for each in together if each.factor == factor for name in (each.base, each.level)}
    for scale in SCALES:
        assert len({trained(level, scale) for level in levels}) == len(levels) > 1


@pytest.mark.parametrize("claim", LEDGER, ids=lambda claim: claim.id)
def test_published_effects_lie_on_the_published_side_and_beyond_the_margin(claim: Claim):
    value = claim.published.value
    if value is not None and claim.test != "level":
        effect, margin = claim.from_unit(value), abs(claim.from_unit(claim.margin))
        assert effect * claim.published.direction > margin


def test_the_list_says_what_has_been_measured(tmp_path, capsys):
    study = Study(tmp_path / "dropout-lab")
    trials = {f"000000000{n}": {"run_dir": f"t-000000000{n}", "overrides": {}, "choices": {}} for n in (1, 2)}
    study.add("x", "basic", [], trials)
    (study.root / "t-0000000001").mkdir()
    (study.root / "t-0000000001" / "result.json").write_text('{"status": "finished"}', encoding="utf-8")
    main(["--results", str(tmp_path), "--multirun", str(tmp_path)])
    shown = capsys.readouterr().out
    assert re.search(
        r"^lrn_alexnet +not measured yet +– +0 of 10 lab, 3 full +−1.4 points of top-1 error$", shown, re.M
    )
    assert f"\n{len(LEDGER)} claims: {len(LEDGER)} not measured yet.\n" in shown
    assert shown.endswith("study dropout-lab: 1 finished, 1 missing\n")


def parameters(*overrides: str) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in instantiate(config(*overrides).model).parameters())


def test_the_sizes_that_the_configs_state_are_those_of_the_networks():
    half, two = ([parameters("experiment=two_towers", f"towers={towers}", f"scale={scale}") for scale in SCALES]
                 for towers in ("one", "two"))  # fmt: skip
    assert [round(100 * (b / a - 1)) for a, b in zip(half, two, strict=True)] == [20, 6]  # lab, full
    claim = load_claim(CLAIMS / "two_groups.yaml")
    assert claim.stands_in.endswith("20% more parameters with two groups")
    for model in ("alexnet_lrn", "alexnet_bn"):
        lab, full = (parameters(f"model={model}", f"scale={scale}") for scale in SCALES)
        assert full / lab == pytest.approx(10, abs=0.5)  # "a tenth"
