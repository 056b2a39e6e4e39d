"""The same transformer in PyTorch: same parameters, same data, same precision, its own attention.

Parameters are float32, activations and the operands of products bfloat16, as in ours; the logits
are float32, as usual in PyTorch.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from optimizer import Schedule
from transformer import Config, initial_parameters
from workloads import Batch

#: Names of the peers: how each is run.
TORCH_PEERS = {
    "torch": "eager, with the fused attention that PyTorch chooses",
    "torch compiled": "torch.compile, with the fused attention that PyTorch chooses",
    "torch dense": "eager, with softmax(q kᵀ) v written out",
}


def import_torch() -> Any:
    """Return PyTorch, or None where it is not installed or sees no GPU."""
    try:
        import torch
    except (ImportError, OSError):  # OSError: a CUDA library of PyTorch is missing
        return None
    return torch if torch.cuda.is_available() else None


class TorchTrainer:
    """Trains like `trainer.Trainer`: `step()` does the next step, `losses` are on the device."""

    def __init__(
        self,
        torch: Any,
        peer: str,
        config: Config,
        data: Batch,
        schedule: Schedule,
        device: str = "cuda",
    ) -> None:
        self.torch, self.schedule, self.steps, self.done = torch, schedule, len(data.tokens), 0
        initial = initial_parameters(config, seed=0)
        self.parameters = {
            # PyTorch's linear maps have their weights as (outputs, inputs).
            name: torch.tensor(
                np.ascontiguousarray(x.T) if name.endswith(".weight") and x.ndim == 2 else x,
                device=device,
                requires_grad=True,
            )
            for name, x in initial.items()
        }
        groups = [
            {"params": [p for p in self.parameters.values() if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in self.parameters.values() if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), fused=True)
        self._batches = [
            None if x is None else torch.tensor(x, device=device, dtype=torch.int64) for x in data
        ]
        self.losses = torch.zeros(self.steps, device=device)
        dense = peer == "torch dense"

        def loss(parameters: Any, tokens: Any, targets: Any, rows: Any) -> Any:
            return model_loss(torch, config, parameters, tokens, targets, rows, dense)

        self._loss = torch.compile(loss) if peer == "torch compiled" else loss

    def step(self) -> None:
        """Do the next step."""
        batch = [None if x is None else x[self.done] for x in self._batches]
        loss = self._loss(self.parameters, *batch)
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(self.done)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses[self.done] = loss.detach()
        self.done += 1


def model_loss(
    torch: Any,
    config: Config,
    parameters: Any,
    tokens: Any,
    targets: Any,
    rows: Any,
    dense: bool,
) -> Any:
    """`transformer.Transformer.loss` in PyTorch's functions."""
    F = torch.nn.functional
    p = {name: x.to(torch.bfloat16) for name, x in parameters.items()}
    batch, seqlen = tokens.shape
    head_dim = config.width // config.heads

    def norm(x: Any, name: str) -> Any:
        return F.layer_norm(x, (config.width,), p[f"{name}.weight"], p[f"{name}.bias"])

    def linear(x: Any, name: str) -> Any:
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def attend(q: Any, k: Any, v: Any) -> Any:
        if not dense:
            return F.scaled_dot_product_attention(q, k, v, is_causal=config.causal)
        scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(head_dim))
        if config.causal:
            hidden = torch.ones(seqlen, seqlen, dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(hidden, -math.inf)
        return scores.softmax(dim=-1) @ v

    x = F.embedding(tokens, p["token"]) + p["position"][:seqlen]
    for layer in range(config.layers):
        name = f"{layer}.attention"
        qkv = linear(norm(x, f"{name}.norm"), f"{name}.qkv")
        heads = qkv.view(batch, seqlen, 3, config.heads, head_dim)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, H, N, D)
        x = x + linear(attend(q, k, v).transpose(1, 2).reshape(x.shape), f"{name}.out")
        name = f"{layer}.mlp"
        wide = linear(norm(x, f"{name}.norm"), f"{name}.up")
        x = x + linear(F.gelu(wide, approximate="tanh"), f"{name}.out")
    x = norm(x, "norm").reshape(batch * seqlen, config.width)
    if rows is not None:
        x = x[rows]
    return F.cross_entropy(F.linear(x, p[config.output]).float(), targets)
