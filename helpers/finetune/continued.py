"""Continue a training from a checkpoint: with this job's options, and with random numbers on every rank."""

from pathlib import Path

from accelerate.utils import DeepSpeedSchedulerWrapper
from transformers import Trainer, set_seed

from helpers.finetune.checkpoints import read_manifest
from helpers.libraries.deepspeed_checkpoints import base_rates, use_options, use_schedule


class ContinuedTrainer(Trainer):
    """Load states as transformers does, then use the options that the configuration has now.

    transformers takes the learning rate, Adam's options and the weight decay from the checkpoint, whatever the
    configuration says. On another number of ranks, some would silently draw the random numbers of step 0 again.
    """

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        assert self.optimizer is not None  # created before its state is loaded
        options = [dict(group) for group in self.optimizer.param_groups]
        rates = base_rates(self.lr_scheduler)
        super()._load_optimizer_and_scheduler(checkpoint)
        if isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper):
            return None  # all was loaded with the engine, and its options are used
        use_options(self.optimizer.param_groups, options)
        use_schedule(self.lr_scheduler, rates)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self.accelerator.scaler is not None:  # a checkpoint of fp16 has a state for it
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and read_manifest(Path(checkpoint))[1]["world_size"] != self.args.world_size:
            # The states are those of other ranks: begin new sequences, which no rank has used before.
            set_seed(self.args.seed + self.state.global_step * self.args.world_size + self.args.process_index)
        else:
            super()._load_rng_state(checkpoint)
