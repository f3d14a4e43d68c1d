"""ZeRO: data parallelism without copies of what only one rank needs at a time (Rajbhandari et al. 2019).

Three classes, each the one before it with one more thing sharded: :class:`Zero1` optimizer states, :class:`Zero2`
gradients as well, :class:`Zero3` parameters as well. With 16-bit weights and Adam a rank of N holds 4Ψ + 12Ψ/N,
2Ψ + 14Ψ/N and 16Ψ/N bytes of model states, and sends 2Ψ, 2Ψ and 3Ψ elements per step (paper, sections 5 and 7).
Chapters 06 to 08 derive them.

    zero = Zero2(model, partial(torch.optim.AdamW, lr=1e-5))
    model(**batch).loss.backward()
    zero.step()

All ranks start with the first one's weights and must run the same operations in each backward. Parameters that are
frozen (``requires_grad_(False)``) when you make one of these stay on every rank in full under ZeRO-1 and -2; ZeRO-3
shards them, too.
"""

from helpers.parallel.zero.stage_1 import Zero1
from helpers.parallel.zero.stage_2 import Zero2
from helpers.parallel.zero.stage_3 import Zero3

__all__ = ["Zero1", "Zero2", "Zero3"]
