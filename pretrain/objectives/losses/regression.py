"""How far a student's features are from a teacher's, where they are predicted as they are and not as prototypes."""

import torch.nn.functional as F
from torch import Tensor

from data.fused import fusible
from pretrain.objectives.losses.precision import at_least_float32


@fusible
def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of ``1 − cosine`` of features ``(…, width)``: 0 to 2."""
    return 1 - F.cosine_similarity(at_least_float32(student), at_least_float32(teacher), dim=-1, eps=1e-6).mean()


@fusible
def normed_smooth_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean smooth L1 (β = 1) to the teacher's features ``(…, width)``, normed once more over their width without
    parameters: large networks have a few dimensions a hundred times the others, which would be all that is learned."""
    normed = F.layer_norm(at_least_float32(teacher), teacher.shape[-1:])
    return F.smooth_l1_loss(at_least_float32(student), normed.expand(student.shape))


DISTANCES = {"cosine": cosine_distance, "smooth_l1": normed_smooth_l1}
"""By name, each ``(student, teacher) → scalar``; the teacher's features may lack dimensions of 1's."""
