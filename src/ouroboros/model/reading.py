"""A model directory of this library is read, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from ouroboros.errors import OuroborosError, check, first_line
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.model.pretrained import quiet_loading


def load_model(directory: Path) -> OuroborosForCausalLM:
    """The model in a transformers directory, in evaluation mode.

    Raises:
        OuroborosError: weights that cannot be read, are missing, unexpected, misshapen or not finite.
    """
    try:
        with quiet_loading():
            model, info = AutoModelForCausalLM.from_pretrained(
                directory,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are in ``info``, and refused below with their names
                output_loading_info=True,
            )
    except OuroborosError:
        raise
    except Exception as error:  # safetensors, JSON and transformers all have their own; the user needs one line
        raise OuroborosError(f"{directory}: cannot load the model: {first_line(error)}") from error
    wrong = []
    for key, entries in info.items():
        names = sorted(
            f"{e[0]} of shape {tuple(e[1])} for {tuple(e[2])}" if isinstance(e, tuple) else str(e) for e in entries
        )
        wrong += [f"{key.replace('_', ' ')}: {', '.join(names[:5])}"] if names else []
    check(not wrong, f"{directory}: the weights do not fit the configuration ({'; '.join(wrong)})")
    for name, parameter in model.named_parameters():
        check(
            bool(torch.isfinite(parameter).all()),
            f"{directory}: weight {name!r} holds NaN or infinity; train again or use an older checkpoint",
        )
    return model.eval()
