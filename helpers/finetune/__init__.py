"""Fine-tune ChatGLM3 with LoRA: data checks, training, evaluation, generation, export."""
