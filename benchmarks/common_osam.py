"""What the benchmarks of OSAM share: what it is compared with, and a second clock.

:class:`StepLoop` is the recurrence as it is defined, one position after another with the whole state; the published
program is loaded from where the user keeps it.
Shapes: B batch, T tokens, D model width, m buckets; the state is K (B, 2, m) and H (B, 2, D, m).
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import ratio
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 17
"""Characters of the published default text."""
OPEN = 1.0
"""Raw value of both gates where results are compared: at their start they let 2 % through and would hide the rest."""


class StepLoop(nn.Module):
    """A step for each position: nothing is summed ahead, no gradient flows through the state.

    Args:
        model: one of the published form, whose weights are used.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.mixer = model.model.decoder.layers[0].self_attn

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits (B, T, V)."""
        K, H = self.empty(len(ids_BT))
        x_BTD = self.model.model.embed_tokens(ids_BT)
        every = self.mixer.spec.kupdate
        ys = [self.step(x_BTD[:, t], t, K, H, reads=t % every == 0) for t in range(ids_BT.shape[1])]
        return self.model.lm_head(torch.stack(ys, dim=1))

    def empty(self, sequences: int) -> tuple[Tensor, Tensor]:
        """The state in front of the first token."""
        width, buckets = self.mixer.q_proj.in_features, self.mixer.spec.buckets
        return torch.zeros(sequences, 2, buckets), torch.zeros(sequences, 2, width, buckets)

    def step(self, e_BD: Tensor, position: int, K: Tensor, H: Tensor, *, reads: bool) -> Tensor:
        """What the head reads of one token, (B, D); K and H are changed in place."""
        part, scale = self.mixer, (position + 1) ** -0.5
        omega = 0.5 * torch.tanh(part.omega_raw)
        q_BD = part.q_proj(e_BD)
        angle_BD = 0.5 * torch.tanh(part.theta_q_raw) * q_BD - omega * position
        Q = self.sketch(q_BD, angle_BD)
        if reads:
            with torch.no_grad():
                memory = torch.fft.fft(torch.complex(K[:, 0], K[:, 1]), norm="ortho")
                u_BD = (H[:, 0] @ Q[:, 0, :, None] - H[:, 1] @ Q[:, 1, :, None])[..., 0] * scale
            query = torch.fft.fft(torch.complex(Q[:, 0], Q[:, 1]), norm="ortho")
            psi_BM = torch.fft.ifft(query * memory, norm="ortho").real * scale
            w_BD = part.value_out(self.drop(F.gelu(part.value_in(part.value_norm(u_BD)))))
        else:
            psi_BM, w_BD = K.new_zeros(len(K), part.spec.buckets), torch.zeros_like(e_BD)
        f_BD = part.readout_out(self.drop(F.gelu(part.readout_in(psi_BM))))
        with torch.no_grad():
            k_BD, v_BD = part.k_proj(e_BD), part.v_proj(e_BD)
            added = self.sketch(k_BD, 0.5 * torch.tanh(part.theta_k_raw) * k_BD + omega * position)
            K += added
            H.addcmul_(v_BD[:, None, :, None], added[:, :, None])
        feature, value = (
            part.spec.gate_cap * torch.sigmoid(raw) for raw in (part.gate_feature_raw, part.gate_value_raw)
        )
        return self.model.model.norm(e_BD + feature * f_BD + value * w_BD)

    def sketch(self, size_BD: Tensor, angle_BD: Tensor) -> Tensor:
        """Sketched real and imaginary part, (B, 2, m)."""
        part = self.mixer
        x_B2D = torch.stack((size_BD * angle_BD.cos(), size_BD * angle_BD.sin()), dim=1) * part.key_signs
        return x_B2D.new_zeros(len(x_B2D), 2, part.spec.buckets).index_add(2, part.key_buckets, x_B2D)

    def drop(self, x: Tensor) -> Tensor:
        """Dropout of both networks."""
        return F.dropout(x, self.mixer.spec.dropout, self.training)

    @torch.no_grad()
    def generate(self, ids_1T: Tensor, new: int) -> Tensor:
        """Prompt and ``new`` tokens, greedy; (1, T + new)."""
        K, H = self.empty(1)
        embed, every, text = self.model.model.embed_tokens, self.mixer.spec.kupdate, ids_1T[0].tolist()
        for t in range(len(text) + new - 1):
            y_1D = self.step(embed(torch.tensor([text[t]])), t, K, H, reads=t % every == 0)
            if t == len(text) - 1:
                text.append(int(self.model.lm_head(y_1D).argmax()))
        return torch.tensor([text])


def spec_of(size: str, **mixer: Any) -> Any:
    """The published model of a size, with the characters of its text; ``mixer``: fields to change."""
    from ouroboros.recipes import recipe

    spec = recipe("osam-published", size).model
    return spec.replace(vocab_size=VOCABULARY, mixer=spec.block.mixer.replace(**mixer))


def clocked(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of wall clock, and of all threads' processor time, which other programs disturb less."""
    start, used = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - used


def ratios(
    mine: Sequence[str], speed: dict[str, list[float]], compared: Callable[..., dict[str, float]] = ratio
) -> dict[str, dict[str, dict[str, float]]]:
    """Every arm of ours against every other one."""
    return {name: {other: compared(speed[name], speed[other]) for other in speed if other not in mine} for name in mine}


def open_gates(model: Any) -> Any:
    """Let both paths of the memory weigh as much as they can be expected to after training; returns ``model``."""
    for name, parameter in model.named_parameters():
        if "gate_" in name:
            nn.init.constant_(parameter, OPEN)
    return model


def published_program(directory: str) -> Any:
    """The module of the published program in ``directory``."""
    place = importlib.util.spec_from_file_location("osam_minidemo", Path(directory) / "osam_minidemo.py")
    assert place is not None and place.loader is not None
    module = importlib.util.module_from_spec(place)
    sys.modules[place.name] = module  # its dataclasses look themselves up
    place.loader.exec_module(module)
    return module


def published_model(program: Any, model: Any, size: str) -> Any:
    """The published program's model with the settings and weights of ours, and with its spectrum kept at the size for
    which it says so."""
    from ouroboros.systems.osam.export import from_model

    spec = model.model.spec
    mixer = spec.block.mixer
    theirs = program.OSAMLM(
        spec.vocab_size,
        spec.hidden_size,
        mixer.buckets,
        mixer.readout_hidden,
        enable_val=mixer.value_path,
        dropout=mixer.dropout,
        use_freq_cache=size == "quick-start",
        kupdate=mixer.kupdate,
    )
    theirs.load_state_dict(from_model(model))
    return theirs
