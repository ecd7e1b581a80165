"""Random weights: their type and place, and the lengths of what they complete."""

from pathlib import Path

import pytest
import torch
from narrow_qwen import narrow
from tiny_families import save

from workflow_scripts.configuration.model import Configuration, load
from workflow_scripts.planning.costs import Length
from workflow_scripts.planning.devices import PlanError
from workflow_scripts.preflight.untrained import Source, ending_rate, ending_tokens


@pytest.mark.parametrize("length", [Length(256, 512), Length(16, 32), Length(3, 1000), Length(90, 100)])
def test_completions_that_end_at_that_rate_have_the_mean_length(length: Length) -> None:
    p = ending_rate(length)
    ends_at = [(1 - p) ** (n - 1) * p for n in range(1, length.longest)]
    mean = sum(n * share for n, share in enumerate(ends_at, 1)) + length.longest * (1 - sum(ends_at))
    assert mean == pytest.approx(length.mean, rel=1e-6)


def test_tokens_that_end_are_that_share_of_the_vocabulary_and_no_special_ones() -> None:
    length = Length(256, 512)
    found = ending_tokens(152064, length, {0})
    assert len(set(found)) == pytest.approx(152064 * ending_rate(length), abs=1)
    assert max(found) < 152064
    without = set(found[:5])
    assert set(ending_tokens(152064, length, without)) == set(found) - without
    assert ending_tokens(5000, Length(512, 512), set()) == []  # nothing ends before the budget is used up


def test_random_weights_are_made_in_the_configured_type_for_the_bundled_processor(tmp_path: Path) -> None:
    c = narrow(tmp_path / "model", {}, dtype="bfloat16")
    source = Source.of(c, tmp_path)
    assert source.random and source.stands_in
    model, processor, config = source.base("hpsv2", Length(8, 16))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.get_input_embeddings().weight.shape == (5000, 128)
    assert sum(p.numel() for p in model.parameters()) == source.reader.architecture.parameters
    weights = torch.cat([p.flatten() for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n]).float()
    assert 0.01 < weights.std() < 0.1 and torch.isfinite(weights).all()
    assert model.config.image_token_id == processor.image_token_id  # type: ignore[attr-defined]
    assert processor.tokenizer.eos_token_id in model.generation_config.eos_token_id  # type: ignore[attr-defined]
    assert config.template.count("{image}") == 2
    again = source.base("hpsv2", Length(8, 16)).model
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_bundled_policy_keeps_its_weights_and_its_question(tmp_path: Path, base_manifest: Path) -> None:
    from workflow_scripts.policy.loading import load_model

    model, _, config = Source.of(Configuration(), tmp_path).base("imagereward")
    assert config.template == Configuration().prompts.pointwise
    plain = load_model(base_manifest, config)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_another_family_needs_its_own_processor(tmp_path: Path) -> None:
    folder = save("smolvlm", tmp_path / "model")
    c = load({"policy": {"source": "hub", "hub": {"path": str(folder)}, "min_pixels": None, "max_pixels": None}})
    assert not Source.of(c, tmp_path).stands_in
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    with pytest.raises(PlanError, match=r"model_type smolvlm.* set policy\.hub\.path to a folder with the files"):
        Source.of(c, tmp_path)
