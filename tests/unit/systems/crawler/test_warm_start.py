"""A crawler begins as the plain model it is put around, and Helix as the crawler it is put beside."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from ouroboros.config import ModelSpec
from ouroboros.config.parts.helix import HelixSpec
from ouroboros.eval.subject import perturb
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.systems.crawler.published import Published
from ouroboros.train.begin import Source, take

SIZES = {
    "vocab_size": 61,
    "model_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "rope_dims": 4,
    "bigram_vocab_size": 64,
    "bigram_dim": 8,
    "ve_enabled": False,
    "xsa_last_n": 0,
}
CRAWLER = Published(**SIZES, num_flat_layers=5, crawler_loop_rope_scales=(9.0, 1.0), inst_dim=8).model(64)


def fresh(spec: ModelSpec, seed: int) -> OuroborosForCausalLM:
    torch.manual_seed(seed)
    return OuroborosForCausalLM(OuroborosConfig.from_spec(spec)).eval()


def trained(spec: ModelSpec) -> OuroborosForCausalLM:
    """A model whose weights are all random, as after training."""
    model = fresh(spec, 0)
    with torch.no_grad():
        perturb(model, 0.1)
    return model


@torch.no_grad()
def logits(model: OuroborosForCausalLM) -> Tensor:
    ids = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids, use_cache=False).logits


def test_a_crawler_begins_as_the_plain_model_around_it() -> None:
    plain = trained(Published(**SIZES, num_layers=5).model(64))
    crawler = fresh(CRAWLER, 1)
    begun = take(crawler, Source("plain", plain, blocks="0-1,new,2-4"))
    assert begun.left == () and all(".layers.2." in name or ".flow." in name for name in begun.anew)
    torch.testing.assert_close(logits(crawler), logits(plain), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["2 crawler:(1)x2 1 crawler 2 crawler", "1 middle:1 crawler:(1)x2 1 crawler 2"])
def test_helix_begins_as_the_crawler_beside_it(layout: str) -> None:
    crawler = trained(CRAWLER)
    helix = fresh(dataclasses.replace(CRAWLER, layout=layout, topology=HelixSpec(stream="crawler", bridge_width=8)), 1)
    begun = take(helix, Source("crawler", crawler))
    assert begun.left == () and all(".exchange." in name for name in begun.anew)
    assert torch.equal(logits(helix), logits(crawler))
    with torch.no_grad():
        helix.get_parameter("model.decoder.topology.exchange.merge").fill_(0.1)
    assert not torch.allclose(logits(helix), logits(crawler), atol=1e-3)
