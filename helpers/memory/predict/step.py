"""What is alive at each moment of a training step.

Peaks of different moments do not add up. DeepSpeed allocates ZeRO-2's buckets at the first gradient, and by then the
logits are gone; gradients exist only when their activations are freed. So each moment is summed on its own. Between
the first layer and the last the sum changes evenly, so that its ends are enough.
"""

from collections import Counter

from helpers.memory.predict import constants
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

LOSS = "end of forward, loss"
LOSS_BACKWARD = "backward of the loss"
OUTPUT_BACKWARD = "backward of the output layer"
LAST_LAYER = "backward of the last layer"
FIRST_GRADIENT = "first gradient"
FIRST_LAYER = "backward of the first layer"
EMBEDDING = "backward of the embedding"
STEP = "optimizer step"


class Step:
    """One step of a configuration, from the second on: the first has no optimizer states yet."""

    def __init__(self, configuration: Configuration) -> None:
        c = self._c = configuration
        self._states = states(c)
        self._kept = saved_by_model(c)
        self._layer = saved_by_layer(c)
        # cuBLAS's workspaces and the rotary frequencies, two copies of head_dim / 4.
        buffers = constants.CUBLAS_THREADS * constants.CUBLAS_WORKSPACE + 2 * FP32 * (c.shape.head_dim // 4)
        self._resident = Counter({**self._states.resident, "buffers": buffers})
        # From forward to the end of backward: what ZeRO-3 gathers, and the gradients of earlier micro-batches.
        self._passing = self._resident + Counter({"communication buffers": self._states.gathered})
        if c.gradient_accumulation_steps > 1:
            self._passing += Counter({"gradients": self._states.gradients})
        self._buckets = Counter({"communication buffers": self._states.buckets})
        self._replaced = Counter({"communication buffers": self._states.replaced})

    def phases(self) -> dict[str, Counter[str]]:
        """Bytes of tensors by item, for each moment."""
        found = {
            LOSS: self._loss() + self._replaced,
            LOSS_BACKWARD: self._loss_backward() + self._replaced,
            OUTPUT_BACKWARD: self._output_backward() + self._replaced,
            LAST_LAYER: self._last_layer(),
            FIRST_LAYER: self._first_layer(),
        }
        if self._late_buckets():
            found[FIRST_GRADIENT] = self._first_gradient()
        if self._c.lora is None:
            found[EMBEDDING] = self._embedding()
        return found | {STEP: self._optimizer()}

    def _forward(self) -> Counter[str]:
        return self._passing + _by_item(self._kept)

    def _behind_output(self) -> Counter[str]:
        """What is left when backward reaches the last layer; with checkpointing the last norm's input is gone.

        Without, the moment is that of the norm itself, or so little later that its input matters less than the MLP.
        """
        if not self._c.checkpointing:
            return self._forward()
        return self._passing + Counter(
            {"activations": total_bytes(saved_checkpoints(self._c)) + total_bytes(saved_by_bitsandbytes(self._c))}
        )

    def _loss(self) -> Counter[str]:
        """16-bit logits, their fp32 copy, log-softmax (ForCausalLMLoss); an fp32 model needs no copy.

        In chunks there is no log-softmax. A trained head keeps 12 bytes a token, its place and its normaliser; a frozen
        one the gradient of its input, which forward makes (helpers/activations/chunked_loss.py).
        Autocast remembers its casts of weights until forward ends, though checkpointing does not keep them.
        """
        c = self._c
        half = c.compute_bytes if c.compute_bytes < FP32 else 0
        casts = c.shape.layers * c.shape.layer_matrices * c.compute_bytes
        remembered = casts if casts_weights(c) and c.checkpointing else 0
        logits = self._logits() * (FP32 + FP32 + half)
        kept = 0
        if c.loss_chunk:
            logits = self._logits() * (FP32 + half) + (0 if c.lora else 12 * c.tokens)
            kept = self._hidden_gradient() if c.lora else 0
        return self._forward() + Counter({"logits and loss": logits, "activations": kept, "parameters": remembered})

    def _hidden_gradient(self) -> int:
        return self._c.tokens * self._c.shape.hidden * self._c.compute_bytes

    def _loss_backward(self) -> Counter[str]:
        """The kept log-softmax, nll_loss's gradient and log-softmax's, all fp32; the logits themselves are freed.

        In chunks: the logits once more, beside the gradients of the output layer and of its input as they grow. With a
        frozen head only the latter is left, and is scaled.
        """
        if self._c.loss_chunk:
            hidden = self._hidden_gradient()
            if self._c.lora:
                return self._forward() + Counter({"activations": 2 * hidden})
            gradient = self._c.shape.embedding * self._c.compute_bytes
            return self._loss() + Counter({"gradients": gradient, "activations": hidden})
        return self._forward() + Counter({"logits and loss": 3 * FP32 * self._logits()})

    def _output_backward(self) -> Counter[str]:
        """The output layer's gradient as it is made: autocast computes it in 16 bit, then casts."""
        c = self._c
        size = 0 if c.lora else c.trainable_bytes + (c.compute_bytes if casts_weights(c) else 0)
        logits = self._logits() * c.compute_bytes
        return self._forward() + Counter({"logits and loss": logits, "gradients": c.shape.embedding * size})

    def _last_layer(self) -> Counter[str]:
        """The layer that backward reaches first: every activation is still there."""
        held = self._behind_output() + self._gradients(self._c.shape.embedding if self._c.lora is None else 0)
        held += Counter({"activations": self._layer_backward()}) + (
            Counter() if self._late_buckets() else self._buckets
        )
        return held + self._recomputed()

    def _late_buckets(self) -> bool:
        # DeepSpeed makes its buckets at the first gradient: the output layer's, or an adapter's within the last layer.
        return self._c.lora is not None and set(self._c.lora.targets) <= set(ATTENTION_INPUTS)

    def _first_gradient(self) -> Counter[str]:
        """In the last layer's attention, when DeepSpeed makes its buckets: the layer's MLP is freed by then."""
        c, shape = self._c, self._c.shape
        left = total_bytes(saved_until_attention_adapters(c)) - (0 if c.checkpointing else total_bytes(self._layer))
        # Gradients of q, k and v, of their input, and of the residual stream.
        widths = (shape.query + 2 * shape.key_value + shape.hidden) * c.compute_bytes
        in_flight = c.tokens * (widths + shape.hidden * c.residual_bytes)
        held = self._behind_output() + self._buckets
        held["activations"] += left + in_flight
        return held

    def _first_layer(self) -> Counter[str]:
        """The layer that backward reaches last: nearly all gradients, only this layer's activations."""
        c = self._c
        done = c.trainable_parameters
        if c.lora is None:  # all but this layer's, down_proj's apart, and the embedding's
            done -= c.shape.layer_parameters - c.shape.hidden * c.shape.intermediate
            done -= 0 if c.shape.tied else c.shape.embedding
        held = self._passing + self._buckets + self._gradients(done)
        held["activations"] += self._layer_backward() + total_bytes(saved_by_bitsandbytes(c))
        if c.checkpointing:
            layer_input, rotary = saved_checkpoints(c)
            held["activations"] += layer_input.size + rotary.total
            return held + self._recomputed()
        return held + _by_item(self._layer)

    def _embedding(self) -> Counter[str]:
        """The last gradient: those of all parameters, and that of the residual stream."""
        c = self._c
        stream = Counter({"activations": c.tokens * c.shape.hidden * c.residual_bytes})
        return self._passing + self._buckets + stream + self._gradients(c.trainable_parameters)

    def _optimizer(self) -> Counter[str]:
        """Fused Adam works in place; DeepSpeed makes fp32 gradients for it."""
        return self._resident + Counter({"gradients": self._states.gradients + self._states.step})

    def _logits(self) -> int:
        """How many exist at a time."""
        return min(self._c.tokens, self._c.loss_chunk or self._c.tokens) * self._c.shape.vocab

    def _recomputed(self) -> Counter[str]:
        """With checkpointing, what one layer keeps is made anew for its backward."""
        c = self._c
        if not c.checkpointing:
            return Counter()
        # Where the residual stream is in fp32, the first norm keeps the checkpoint itself.
        shared = c.tokens * c.shape.hidden * FP32 if c.residual_bytes == FP32 else 0
        return _by_item(self._layer) - Counter({"activations": shared})

    def _gradients(self, done: int) -> Counter[str]:
        """Gradients of the ``done`` parameters that backward has passed, at most what the strategy keeps of them."""
        c, whole = self._c, self._states.gradients
        if c.gradient_accumulation_steps > 1:  # they are there already
            return Counter()
        # DeepSpeed's stage 2 makes room for its whole part at the first reduction.
        at_once = c.strategy.zero_stage == 2 and done > 0
        return Counter({"gradients": whole if at_once else min(whole, done * c.trainable_bytes)})

    def _layer_backward(self) -> int:
        """Gradients in flight within a layer, beside what it kept: the larger of its MLP's and its norm's.

        MLP: that of down_proj's input, and those of both factors of SwiGLU; a kept down_proj input is freed by then.
        Norm: the factors of x · 1/rms and of its square, five in fp32. Both: the residual stream's.
        """
        c = self._c
        narrow = c.tokens * c.shape.intermediate * c.compute_bytes
        mlp = (2 if c.lora is None or c.strategy.zero_stage == 3 else 3) * narrow
        norm = 5 * c.tokens * c.shape.hidden * FP32
        # bitsandbytes makes a quantised matrix whole in 16 bit for the product.
        dequantised = 2 * c.shape.hidden * c.shape.intermediate * c.compute_bytes if c.quantization_bits < 16 else 0
        return max(mlp, norm) + c.tokens * c.shape.hidden * c.residual_bytes + dequantised


def _by_item(saved: list[SavedTensor]) -> Counter[str]:
    """Split saved tensors into activations and 16-bit copies of weights, in bytes."""
    return Counter({"activations": total_bytes(saved), "parameters": total_bytes(saved, weights=True)})
