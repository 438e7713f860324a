"""The public ops: `from syncr1.kernels.api import grpo_loss, …`; each is documented where it is, in `ops/`.

Each op is served by one of several backends with one meaning (`syncr1.kernels.dispatch`); `backend=` names one.
"""

from __future__ import annotations

from .attention import SharedPrefixLayout, attention_provider
from .checks import NonFiniteError, non_finite_passes
from .dispatch import BackendError
from .ops.cached_prefix import cached_prefix_attention
from .ops.decode_attention import prefix_decode_attention
from .ops.groups import dgs_select, group_advantages, grpo_plan
from .ops.linear_loss import linear_grpo_loss
from .ops.logp import linear_logp, selective_logp
from .ops.loss import grpo_loss
from .ops.sample import cfg_sample
from .ops.shared_prefix import shared_prefix_attention
from .options import LossOptions
from .outputs import CFGSample, GRPOOutput, GRPOPlan
from .streams import TokenStream

__all__ = [
    "group_advantages",
    "dgs_select",
    "grpo_plan",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_logp",
    "selective_logp",
    "cfg_sample",
    "shared_prefix_attention",
    "cached_prefix_attention",
    "prefix_decode_attention",
    "SharedPrefixLayout",
    "TokenStream",
    "GRPOOutput",
    "GRPOPlan",
    "CFGSample",
    "LossOptions",
    "BackendError",
    "NonFiniteError",
    "attention_provider",
    "non_finite_passes",
]
