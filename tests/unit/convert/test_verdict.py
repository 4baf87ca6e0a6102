"""What a healing was worth: shares of the gap, sentences, and a Controller that is misled."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec
from ouroboros.config.parts.loop import BridgeSpec
from ouroboros.config.parts.modulated import ControllerSpec, modulated
from ouroboros.convert.verdict import (
    CONTROLS,
    RESAMPLES,
    ArmResult,
    as_json,
    best_of,
    closed,
    compare,
    misled,
    sentence,
    steering_sentence,
)
from ouroboros.eval.score import Score
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM

UNITS = 12
NOISE = np.random.default_rng(5).normal(0, 1.0, UNITS)


def score(nats: Any, text: str = "in") -> Score:
    """A score of units of 100 bytes."""
    nats = np.asarray(nats, np.float64)
    size = 100 * len(nats)
    return Score(
        bits_per_byte=nats.sum() / math.log(2) / size,
        nats_per_token=nats.sum() / size,
        nats_per_token_stderr=None,
        bytes=size,
        tokens=size,
        unknown_tokens=0,
        nats=nats.sum(),
        stderr=None,
        interval=None,
        units=len(nats),
        unit="document",
        documents=len(nats),
        empty_documents=0,
        loops=None,
        window=64,
        stride=64,
        reading="windows",
        bos_rule="",
        data_sha256=text,
        model="",
        unit_nats=nats,
        unit_bytes=np.full(len(nats), 100),
    )


def arm(name: str, valid: float | None = None, spread: float = 1.0, **means: float) -> ArmResult:
    """An arm whose units have these means by text, and a noise that all arms share but for a tenth."""
    own = np.random.default_rng(len(name)).normal(0, 0.1 * spread, UNITS)
    scores = {text: score(mean + NOISE + own, text) for text, mean in means.items()}
    return ArmResult(name=name, description="", valid_bits_per_byte=valid, trained={"bridge": 1}, scores=scores)


def known(*arms: ArmResult) -> dict[str, ArmResult]:
    return {one.name: one for one in arms}


DONOR, CUT = arm("donor", a=100.0, b=100.0), arm("cut", a=110.0, b=110.0)


def test_the_share_is_that_of_the_gap_and_its_interval_that_of_resampled_units() -> None:
    chooser = np.random.default_rng(1)
    donor, cut, healed = (mean + chooser.normal(0, 2, 9) for mean in (100, 120, 105))
    found = closed(score(donor), score(cut), score(healed))
    assert found.share == pytest.approx((cut.sum() - healed.sum()) / (cut.sum() - donor.sum()), rel=1e-12)
    draws = np.random.default_rng(7)  # of another seed, so that only the distribution agrees
    shares = []
    for _ in range(20 * RESAMPLES):
        units = draws.integers(9, size=9)
        shares.append((cut[units].sum() - healed[units].sum()) / (cut[units].sum() - donor[units].sum()))
    low, high = np.quantile(shares, (0.025, 0.975))
    assert found.low is not None and found.high is not None
    assert abs(found.low - low) < 0.1 * (high - low) and abs(found.high - high) < 0.1 * (high - low)
    assert closed(score(donor), score(cut), score(cut)).to_dict() == {"share": 0.0, "low": 0.0, "high": 0.0}
    assert closed(score(donor), score(cut), score(donor)).to_dict() == {"share": 1.0, "low": 1.0, "high": 1.0}


def test_without_a_gap_there_is_no_share_and_one_unit_has_no_interval() -> None:
    assert closed(score([5.0, 5]), score([5.0, 4]), score([1.0, 1])).to_dict() == dict.fromkeys(
        ("share", "low", "high")
    )
    assert closed(score([4.0]), score([6.0]), score([5.0])).to_dict() == {"share": 0.5, "low": None, "high": None}
    uncertain = closed(score([0.0, 9]), score([6.0, 6]), score([5.0, 5]))  # of the second unit alone there is no gap
    assert uncertain.share == pytest.approx(2 / 3) and uncertain.low is None


def test_the_difference_of_two_arms_is_paired() -> None:
    arms = known(CUT, arm("healed", a=105.0, b=112.0))
    found = compare(arms, "healed", "cut")
    assert found["a"].delta == pytest.approx(-5 / 100 / math.log(2), abs=2e-3)
    assert (found["a"].verdict, found["b"].verdict) == ("better", "worse")


def test_no_gain() -> None:
    for worse in (110.0, 112.0):
        said = sentence(known(DONOR, CUT, arm("healed", a=worse, b=worse)), "healed")
        assert said == "No held-out gain: healed is not better than the cut donor on any held-out text."


def test_a_gain_on_every_text_and_on_some() -> None:
    said = sentence(known(DONOR, CUT, arm("healed", a=102.0, b=104.0)), "healed")
    assert said.startswith("healed closes 80 % of the gap on a (") and ", 60 % of the gap on b (" in said
    assert said.endswith(").") and "No held-out" not in said
    some = sentence(known(DONOR, CUT, arm("healed", a=102.0, b=111.0)), "healed")
    assert "80 % of the gap on a" in some and some.endswith("and no gain is shown on b.")


def test_a_gain_where_the_cut_donor_was_as_good_as_the_donor() -> None:
    arms = known(arm("donor", a=111.0), arm("cut", a=110.0), arm("healed", a=105.0))
    assert sentence(arms, "healed") == "healed is better than the cut donor."


def controlled(controller: float, healed: float, static: float | None, misled: float) -> str:
    arms = [DONOR, CUT, arm("healed", a=healed, b=healed)]
    arms += [] if static is None else [arm("static", a=static, b=static)]
    arms += [arm("controller", a=controller, b=controller)]
    arms += [arm(f"controller, {how}", a=misled, b=misled) for how in CONTROLS]
    return steering_sentence(known(*arms))


def test_whether_the_controller_adds_something() -> None:
    whole = "The Controller is better than healed and static on every held-out text, "
    assert controlled(101, 103, 102, 104) == whole + "and needs the state that it sees."
    assert controlled(101, 103, 102, 101) == whole + "though not for the state that it sees."
    assert controlled(101, 103, 101, 104) == "The Controller is better than healed alone."
    assert controlled(101, 101, 103, 104) == "The Controller is better than static alone."
    assert controlled(101, 101, 101, 104) == "The Controller adds nothing that these texts show to healed and static."
    assert controlled(103, 101, None, 104) == "The Controller adds nothing that these texts show to healed."
    assert steering_sentence(known(DONOR, CUT, arm("healed", a=1.0, b=1.0))) == ""
    assert steering_sentence(known(DONOR, CUT, arm("controller", a=1.0, b=1.0))) == ""
    some = [arm(f"controller, {how}", a=104.0, b=101.0) for how in CONTROLS]
    arms = known(DONOR, CUT, arm("healed", a=102.0, b=102.0), arm("controller", a=101.0, b=101.0), *some)
    assert steering_sentence(arms).endswith("and needs the state that it sees on a.")
    arms = known(DONOR, CUT, arm("healed", a=102.0, b=102.0), arm("controller", a=101.0, b=101.0))
    assert "though not for the state" in steering_sentence(arms)  # that it needs it was not tried
    assert sentence(arms, "healed").endswith(steering_sentence(arms))


def test_the_best_arm_is_that_of_validation() -> None:
    arms = [DONOR, CUT, arm("healed", 2.0, a=1.0), arm("static", 1.9, a=9.0), arm("controller", 2.1, a=0.0)]
    assert best_of(arms).name == "static"
    blind = [arm("bridge", a=1.0), arm("healed", a=1.0), ArmResult(name="controller, shuffled", description="")]
    assert best_of(blind).name == "healed"


def test_as_json() -> None:
    healed = arm("healed", 2.0, a=105.0)
    facts = as_json([arm("donor", a=100.0), arm("cut", a=110.0), healed], "healed")
    assert facts["best"] == "healed" and facts["verdict"].startswith("healed closes 50 % of the gap on a")
    row = facts["arms"][2]
    assert row["trained_parameters"] == 1 and row["texts"]["a"]["closed"]["share"] == pytest.approx(0.5, abs=0.02)
    assert row["texts"]["a"]["against_cut"]["verdict"] == "better"


SPEC = ModelSpec(layout="1 loop:(1)x2 1", vocab_size=61, hidden_size=16, max_position_embeddings=64).replace(
    mixer=AttentionSpec(num_heads=2), ffn=FeedForwardSpec(intermediate_size=24)
)


@pytest.mark.parametrize("how", CONTROLS)
def test_misled_parts_see_another_state_and_are_led_again(how: str) -> None:
    torch.manual_seed(0)
    spec = modulated(SPEC, (ControllerSpec(rank=3, style=4), BridgeSpec()), rank=3, alpha=3.0)
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(spec)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(0, 61, (2, 20))
    part: Any = model.model.decoder.loops[0]["controller"]  # pyrefly: ignore
    hand, seen = type(part).hand, []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(type(part), "hand", lambda self, x, *rest: seen.append(x) or hand(self, x, *rest))
        before = model(ids, use_cache=False).logits
        right = seen[0].flatten(0, 1)
        with misled(model, how):
            wrong = model(ids, use_cache=False).logits
        other = seen[2].flatten(0, 1)
        after = model(ids, use_cache=False).logits
    assert len(seen) == 6 and torch.equal(before, after) and "hand" not in vars(part)
    assert (wrong - before).abs().max() > 1e-3
    if how == "constant":
        torch.testing.assert_close(other, right.mean(0).expand_as(right))
    else:
        assert torch.equal(other.sort(0).values, right.sort(0).values)  # the same rows
        assert (other != right).any(1).float().mean() > 0.8


def test_parts_are_led_again_after_an_error() -> None:
    spec = modulated(SPEC, (ControllerSpec(rank=3, style=4),), rank=3, alpha=3.0)
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(spec))
    with pytest.raises(RuntimeError), misled(model, "constant"):
        raise RuntimeError
    assert "hand" not in vars(model.model.decoder.loops[0]["controller"])  # pyrefly: ignore
