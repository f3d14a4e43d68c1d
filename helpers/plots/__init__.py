"""Every figure of the course, in one style: legible on a projector, one palette, safe for colour-blind readers.

Functions take plain data and return a :class:`CourseFigure`. They use neither pyplot nor a backend, so a figure looks
the same from a script, a rank or a notebook, and no figure stays open.
"""

from helpers.plots.allocator import allocator_history
from helpers.plots.bars import bars_by_rank, rates_and_memory, stacked_seconds
from helpers.plots.cluster import cluster_sketch
from helpers.plots.communication import collective, collective_rounds, overlap, trace_lanes, transfer_times
from helpers.plots.curves import bytes_over_step, measured_against_formula, scaling
from helpers.plots.diagrams import megatron_block, offload_memories
from helpers.plots.matrices import matmul_parts, matrix_parts
from helpers.plots.memory_bars import memory_bars, memory_sources, memory_steps, predicted_and_measured
from helpers.plots.memory_timeline import memory_timeline
from helpers.plots.meshes import layout_times, mesh_cube
from helpers.plots.model_states import model_states
from helpers.plots.movement import movement, ring_all_reduce
from helpers.plots.offload import offload_lanes
from helpers.plots.predictions import model_sizes, prediction_errors
from helpers.plots.quantization import codebook_histogram, format_errors, loss_differences
from helpers.plots.roofline import roofline
from helpers.plots.saved_tensors import saved_tensor_bars, trade_off
from helpers.plots.schedule import Span, lanes, message_orders, partition_lanes, schedule_lanes
from helpers.plots.style import CATEGORY_COLOURS, RANK_COLOURS, CourseFigure, save_figure
from helpers.plots.techniques import techniques
from helpers.plots.training import dev_loss_over_examples, loss_and_memory, score_bars, smoothed, token_lengths

__all__ = [
    "CATEGORY_COLOURS",
    "RANK_COLOURS",
    "CourseFigure",
    "Span",
    "allocator_history",
    "bars_by_rank",
    "bytes_over_step",
    "cluster_sketch",
    "codebook_histogram",
    "collective",
    "collective_rounds",
    "dev_loss_over_examples",
    "format_errors",
    "lanes",
    "layout_times",
    "loss_and_memory",
    "loss_differences",
    "matmul_parts",
    "matrix_parts",
    "measured_against_formula",
    "megatron_block",
    "memory_bars",
    "memory_sources",
    "memory_steps",
    "memory_timeline",
    "mesh_cube",
    "message_orders",
    "model_sizes",
    "model_states",
    "movement",
    "offload_lanes",
    "offload_memories",
    "overlap",
    "partition_lanes",
    "predicted_and_measured",
    "prediction_errors",
    "rates_and_memory",
    "ring_all_reduce",
    "roofline",
    "save_figure",
    "saved_tensor_bars",
    "scaling",
    "schedule_lanes",
    "score_bars",
    "smoothed",
    "stacked_seconds",
    "techniques",
    "token_lengths",
    "trace_lanes",
    "trade_off",
    "transfer_times",
]
