"""Sum what is alive at each phase of a training step.

Peaks of different phases do not add up. DeepSpeed allocates ZeRO-2's buckets at the first gradient, when the logits are
gone already; a gradient appears as its activations are freed. So each phase is summed on its own. Between the first
layer and the last the sum changes evenly, so its two ends are enough.

Read off transformers' models/glm/modeling_glm.py and loss/loss_utils.py, helpers/activations/chunked_loss.py, and
DeepSpeed's runtime/zero/stage_1_and_2.py and stage3.py; tests/test_predict.py measures the same phases in runs.
"""

from collections import Counter

from helpers.memory.predict import constants, gathered, in_flight, reduced
from helpers.memory.predict.configuration import Configuration
from helpers.memory.predict.saved_tensors import (
    ATTENTION_INPUTS,
    FP32,
    SavedTensor,
    casts_weights,
    saved_by_bitsandbytes,
    saved_by_layer,
    saved_by_model,
    saved_checkpoints,
    saved_until_attention_adapters,
    total_bytes,
)
from helpers.memory.predict.states import states

LAST_FORWARD = "forward of the last layer"
LOSS = "end of forward, loss"
LOSS_BACKWARD = "backward of the loss"
OUTPUT_BACKWARD = "backward of the output layer"
LAST_LAYER = "backward of the last layer"
OUTPUT_REDUCED = "reduction of the output layer's gradient"
TWO_RANKS = "reduction of two ranks' gradients"
FIRST_GRADIENT = "first gradient"
FIRST_LAYER = "backward of the first layer"
EMBEDDING = "backward of the embedding"
REDUCTION = "reduction after backward"
STEP = "optimizer step"
REDUCTIONS = (OUTPUT_REDUCED, TWO_RANKS, REDUCTION)


class Step:
    """One step of a configuration, from the second on: the first has no optimizer states yet.

    ``states``, ``saved`` (what the whole forward saves) and ``layer`` (what one layer saves without checkpointing) are
    computed once, here.

    Args:
        configuration: The job.
    """

    def __init__(self, configuration: Configuration) -> None:
        c = self.configuration = configuration
        self.states = states(c)
        self.saved = saved_by_model(c)
        self.layer = saved_by_layer(c)
        # cuBLAS's workspaces and the rotary frequencies, two copies of head_dim / 4.
        buffers = constants.CUBLAS_THREADS * c.machine.cublas_workspace + 2 * FP32 * (c.shape.head_dim // 4)
        self._resident = Counter({**self.states.resident, "buffers": buffers})
        self._passing = self._resident
        if c.gradient_accumulation_steps > 1:  # from forward to the end of backward, those of earlier micro-batches
            self._passing += Counter({"gradients": self.states.gradients})
        gathers = c.strategy.zero_stage == 3 and (c.strategy.world_size > 1 or c.strategy.offload_parameters)
        self._most_gathered = gathered.most_gathered(c) if gathers else {}
        self._buckets = Counter({"communication buffers": self.states.buckets})
        self._replaced = Counter({"communication buffers": self.states.replaced})

    @property
    def logits(self) -> int:
        """Number of logits that exist at a time."""
        c = self.configuration
        return min(c.tokens, c.loss_chunk or c.tokens) * c.shape.vocab

    def phases(self) -> dict[str, Counter[str]]:
        """Sum the tensors alive at each phase of the step.

        Returns:
            Bytes per item, for each phase by name, in the order of the step.
        """
        found = {
            LOSS: self._loss() + self._replaced,
            LOSS_BACKWARD: self._loss_backward() + self._replaced,
            OUTPUT_BACKWARD: self._output_backward() + self._replaced,
            LAST_LAYER: self._last_layer(),
            FIRST_LAYER: self._first_layer(),
        }
        c = self.configuration
        if c.loss_chunk and not c.checkpointing:  # all logits would need more, and so does recomputing a layer
            found = {LAST_FORWARD: self._last_forward() + self._replaced} | found
        if self._late_buckets():
            found[FIRST_GRADIENT] = self._first_gradient()
        if c.lora is None:
            found[EMBEDDING] = self._embedding()
        return found | self._reductions() | {STEP: self._optimizer()}

    def _gathered(self, *parts: str) -> Counter[str]:
        """Return the most that ZeRO-3 holds whole in the given parts of a step (gathered.py)."""
        elements = max(self._most_gathered.get(part, 0) for part in parts)
        return Counter({"communication buffers": elements * self.configuration.residual_bytes})

    def _forward(self) -> Counter[str]:
        return self._passing + _by_item(self.saved)

    def _behind_output(self) -> Counter[str]:
        """Sum what is left when backward reaches the last layer.

        With checkpointing the input of the last norm is gone by then. Without, the phase is that of the norm itself, or
        so soon after it that the norm's input matters less than the MLP.
        """
        c = self.configuration
        if not c.checkpointing:
            return self._forward()
        return self._passing + _by_item([*saved_checkpoints(c), *saved_by_bitsandbytes(c)])

    def _last_forward(self) -> Counter[str]:
        """Sum forward of the last MLP, which can be the peak if the loss is computed in chunks."""
        c = self.configuration
        held = self._passing + _by_item(self.saved) + self._gathered(gathered.FORWARD)
        held["activations"] += in_flight.last_forward(c) - c.tokens * c.shape.hidden * FP32  # the last norm's input
        return held

    def _loss(self) -> Counter[str]:
        """Sum the end of forward: 16-bit logits, their fp32 copy, log-softmax (ForCausalLMLoss in loss_utils.py).

        An fp32 model needs no copy. The chunked loss makes no log-softmax: a trained head keeps 12 bytes per token, its
        position and its log-sum-exp; a frozen one the gradient of its input, which forward computes already
        (helpers/activations/chunked_loss.py). Autocast caches its casts of weights until forward ends, although
        checkpointing does not save them.
        """
        c = self.configuration
        half = c.compute_bytes if c.compute_bytes < FP32 else 0
        casts = c.shape.layers * c.shape.layer_matrices * c.compute_bytes
        cached = casts if casts_weights(c) and c.checkpointing else 0
        logits = self.logits * (FP32 + FP32 + half)
        saved = 0
        if c.loss_chunk:
            # A frozen head keeps 16-bit logits beside log_softmax and the fp32 copy that it reads (_probabilities).
            logits = self.logits * (FP32 + half + (FP32 if c.lora and half else 0)) + (0 if c.lora else 12 * c.tokens)
            saved = self._hidden_gradient() if c.lora else 0
        made = Counter({"logits and loss": logits, "activations": saved, "parameters": cached})
        return self._forward() + self._gathered(gathered.OUTPUT) + made

    def _hidden_gradient(self) -> int:
        c = self.configuration
        return c.tokens * c.shape.hidden * c.compute_bytes

    def _loss_backward(self) -> Counter[str]:
        """Sum the saved log-softmax, nll_loss's gradient and log-softmax's, all fp32; the logits are freed by then.

        The chunked loss computes the logits again, while the gradients of the output layer and of its input grow. With
        a frozen head only the latter remains, and is scaled.
        """
        c = self.configuration
        held = self._forward() + self._gathered(gathered.OUTPUT)
        if c.loss_chunk:
            hidden = self._hidden_gradient()
            if c.lora:
                return held + Counter({"activations": 2 * hidden})
            gradient = c.shape.embedding * c.compute_bytes
            return self._loss() + Counter({"gradients": gradient, "activations": hidden})
        return held + Counter({"logits and loss": 3 * FP32 * self.logits})

    def _output_backward(self) -> Counter[str]:
        """Sum backward of the output layer.

        Autocast computes its gradient in 16 bit. When that is cast, logits and the weight's 16-bit copy are gone.
        """
        c = self.configuration
        size = 0 if c.lora else c.compute_bytes if casts_weights(c) else c.trainable_bytes
        logits = self.logits * c.compute_bytes
        made = Counter({"logits and loss": logits, "gradients": c.shape.embedding * size})
        if not c.lora and casts_weights(c):
            cast = Counter({"gradients": c.shape.embedding * c.trainable_bytes})
            made = max(made, cast, key=Counter.total)
        return self._forward() + self._gathered(gathered.OUTPUT_BACKWARD) + made

    def _last_layer(self) -> Counter[str]:
        """Sum backward of the layer that it reaches first, when every activation is still alive."""
        c = self.configuration
        held = self._behind_output() + self._gradients(c.shape.embedding if c.lora is None else 0)
        held += self._in_flight(gathered.LAST)
        if not self._late_buckets():
            held += self._buckets
        return held + self._recomputed()

    def _in_flight(self, layer: str) -> Counter[str]:
        """Sum what a layer's backward makes, and what ZeRO-3 holds whole for it.

        With checkpointing ZeRO-3 holds the whole layer when it has just been recomputed, but only the first gradient of
        its MLP exists by then. It takes the larger of both moments.
        """
        c = self.configuration
        backward = self._gathered(f"{layer}, {gathered.MLP}") + Counter({"activations": in_flight.layer_backward(c)})
        if not c.checkpointing:
            return backward
        made = c.tokens * (c.shape.hidden * c.residual_bytes + c.shape.intermediate * c.compute_bytes)
        recomputed = self._gathered(f"{layer}, {gathered.RECOMPUTED}") + Counter({"activations": made})
        return max(backward, recomputed, key=Counter.total)

    def _late_buckets(self) -> bool:
        # DeepSpeed allocates its buckets at the first gradient: the output layer's, or an adapter's in the last layer.
        lora = self.configuration.lora
        return lora is not None and set(lora.targets) <= set(ATTENTION_INPUTS)

    def _reductions(self) -> dict[str, Counter[str]]:
        """Sum when ZeRO-1 and ZeRO-2 reduce: the output layer's gradient during backward, or all of them after it."""
        c = self.configuration
        if c.strategy.zero_stage in (1, 2) and not self.states.at_once:
            gradients = reduced.after_backward(c, self.states)
            if c.gradient_accumulation_steps > 1:  # they exist already
                gradients -= self.states.gradients
            return {REDUCTION: self._passing + self._buckets + Counter({"gradients": gradients})}
        if not self.states.at_once or c.lora:
            return {}
        made = Counter({"gradients": reduced.at_output(c, self.states)})
        if c.strategy.offload_optimizer and reduced.fits_bucket(c):  # within a layer, by a gradient beyond the bucket
            beyond = c.shape.hidden * c.shape.intermediate * c.trainable_bytes
            made += self._recomputed() + Counter({"gradients": beyond})
        found = {OUTPUT_REDUCED: self._behind_output() + self._buckets + made}
        if (ranks := c.strategy.world_size) > 1:  # the last rank's parameters end when backward has done its share
            left = total_bytes(self.saved) * (ranks - 1) // ranks
            made = Counter({"gradients": reduced.of_two_ranks(c, self.states), "activations": left})
            found[TWO_RANKS] = self._passing + self._buckets + made
        return found

    def _first_gradient(self) -> Counter[str]:
        """Sum the last layer's attention, when DeepSpeed allocates its buckets: the layer's MLP is freed by then."""
        c, shape = self.configuration, self.configuration.shape
        left = total_bytes(saved_until_attention_adapters(c)) - (0 if c.checkpointing else total_bytes(self.layer))
        # Gradients of q, k and v, of their input, and of the residual stream.
        widths = (shape.query + 2 * shape.key_value + shape.hidden) * c.compute_bytes
        in_flight = c.tokens * (widths + shape.hidden * c.residual_bytes)
        held = self._behind_output() + self._buckets + self._gathered(f"{gathered.LAST}, {gathered.ATTENTION}")
        held["activations"] += left + in_flight
        return held

    def _first_layer(self) -> Counter[str]:
        """Sum backward of the layer that it reaches last: nearly all gradients, only this layer's activations."""
        c = self.configuration
        done = c.trainable_parameters
        if c.lora is None:  # all but the embedding's and this layer's, of which only down_proj's exists already
            done -= c.shape.layer_parameters - c.shape.hidden * c.shape.intermediate
            done -= 0 if c.shape.tied else c.shape.embedding
        held = self._passing + self._buckets + self._gradients(done) + self._in_flight(gathered.FIRST)
        held["activations"] += total_bytes(saved_by_bitsandbytes(c))
        if c.checkpointing:
            layer_input, rotary = saved_checkpoints(c)
            held["activations"] += layer_input.size + rotary.total
            return held + self._recomputed()
        return held + _by_item(self.layer)

    def _embedding(self) -> Counter[str]:
        """Sum the last gradient: those of all parameters, and that of the residual stream.

        ZeRO-3 keeps only a partition, but the embedding's gradient is whole until it is reduced, at the very end. With
        the optimizer in host memory, this rank's part then goes there from a copy, and once more in fp32
        (``partition_grads`` in stage3.py).
        """
        c = self.configuration
        stream = Counter({"activations": c.tokens * c.shape.hidden * c.residual_bytes})
        held = self._passing + self._buckets + self._gathered(gathered.EMBEDDING_BACKWARD)
        if c.strategy.zero_stage == 3:
            whole = c.shape.embedding * c.trainable_bytes
            part = -(-c.shape.embedding // c.strategy.world_size) * (c.trainable_bytes + FP32)
            return held + Counter({"gradients": whole + (part if c.strategy.offload_optimizer else 0)})
        if self.states.at_once:
            stream += Counter({"gradients": reduced.at_embedding(c)})
        return held + stream + self._gradients(c.trainable_parameters)

    def _optimizer(self) -> Counter[str]:
        """Sum the optimizer's step: fused Adam works in place, DeepSpeed makes fp32 gradients for it."""
        return self._resident + Counter({"gradients": self.states.kept + self.states.step})

    def _recomputed(self) -> Counter[str]:
        """Sum what checkpointing recomputes for the backward of one layer."""
        c = self.configuration
        if not c.checkpointing:
            return Counter()
        # If the first norm keeps its input in the residual stream's type, that is the checkpoint itself.
        keeps = c.residual_bytes == FP32 or c.compiled
        shared = c.tokens * c.shape.hidden * c.residual_bytes if keeps else 0
        return _by_item(self.layer) - Counter({"activations": shared})

    def _gradients(self, done: int) -> Counter[str]:
        """Sum the gradients of the ``done`` parameters that backward has passed, as far as the strategy keeps them."""
        c, most = self.configuration, self.states.gradients
        if c.gradient_accumulation_steps > 1:  # they exist already
            return Counter()
        at_once = self.states.kept if self.states.at_once and done > 0 else 0
        return Counter({"gradients": at_once + min(most - at_once, done * c.trainable_bytes)})


def _by_item(saved: list[SavedTensor]) -> Counter[str]:
    """Split saved tensors into activations and 16-bit copies of weights, in bytes."""
    return Counter({"activations": total_bytes(saved), "parameters": total_bytes(saved, weights=True)})
