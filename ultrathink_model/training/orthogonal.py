"""The orthogonal factor of matrices by Newton–Schulz iteration, batched, and shared out over ranks."""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

# A quintic a x + b x³ + c x⁵ whose slope at 0 is as steep as it can be while [0, 1] stays near 1: five rounds bring
# every singular value above 0.002 of the norm into [0.68, 1.21].
# Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


def orthogonalise(matrices: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch rows columns"]:
    """Replaces the singular values of each matrix by numbers near 1 and keeps its singular vectors.

    Args:
        matrices: Any number of leading batch dimensions; a zero matrix stays zero. The computation is in their
            precision; bfloat16 does.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    x = x.reshape(-1, *x.shape[-2:])  # (batch, short, long)
    a, b, c = NEWTON_SCHULZ
    for _ in range(ROUNDS):
        gram = x @ x.mT  # (batch, short, short)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.mT if tall else x
    return x.reshape(matrices.shape)


def orthogonalise_over_ranks(matrices: Float[Tensor, "batch rows columns"]) -> Float[Tensor, "batch rows columns"]:
    """`orthogonalise` of a batch that every rank holds alike: each rank does its share, and all get the whole.

    The iteration costs about (rows / tokens per rank) of a training step, and ranks that repeat each other's work
    would pay it in full.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size == 1:
        return orthogonalise(matrices)
    count = matrices.shape[0]
    share = -(-count // world_size)
    first = min(count, share * dist.get_rank())
    own = orthogonalise(matrices[first : first + share])
    padded = own.new_zeros(share, *matrices.shape[1:])
    padded[: own.shape[0]] = own
    gathered = padded.new_empty(share * world_size, *matrices.shape[1:])
    dist.all_gather_single(gathered, padded)
    return gathered[:count]
