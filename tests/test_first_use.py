"""In chapters 00 to 02 no term comes before its explanation, for a reader who has trained on one GPU.

Outputs are not searched: a cell may print a word that the next sentence explains. Neither is the table of letters in
chapter 00, which names the chapter that explains each.
"""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
TABLE_OF_LETTERS = ("00", "c67")
CHAPTERS = ("00_start_here", "01_memory_budget", "02_data_parallel")
# What such a reader brings along: abbreviations that need no explanation.
KNOWN = {"CPU", "CUDA", "GPT", "GPU", "GPUs", "JSON", "NVIDIA", "RAM", "SGD", "TCP"}
ABBREVIATION = re.compile(r"\b[A-Za-z]*[A-Z]{2,}[A-Za-z0-9]*\b")
# term: how it is found, where it is explained (chapter, cell), and the words that explain it there.
EXPLAINED = {
    "rank": (r"\branks?\b", "00", "c00", "several processes, called *ranks*"),
    "collective": (r"collectives?\b", "00", "c00", "the operations that all ranks take part in"),
    "torchrun": (r"torchrun", "00", "c00", "`torchrun`, PyTorch's launcher"),
    "backend": (r"\bbackend", "00", "c02", "the library that moves the bytes between ranks"),
    "bf16": (r"\bbf16|bfloat16", "00", "c02", "bf16 is a 16-bit format"),
    "NCCL": (r"NCCL|nccl", "00", "c02", "NVIDIA's library for collectives between GPUs"),
    "gloo": (r"gloo", "00", "c02", "Meta's library for collectives"),
    "host memory": (r"host memory", "00", "c02", "host memory (the CPU's memory)"),
    "world size": (r"world.size", "00", "c04", "how many ranks there are (the **world size**)"),
    "process group": (r"process group", "00", "c04", "through which they exchange tensors"),
    "forked": (r"\bfork", "00", "c08", "*forked* (copied)"),
    "all-reduce": (r"all.reduce", "00", "c12", "an all-reduce (a sum over all ranks)"),
    "LOCAL_RANK": (r"LOCAL_RANK|local_rank", "00", "c16", "its number on this machine"),
    "LOCAL_WORLD_SIZE": (r"LOCAL_WORLD_SIZE", "00", "c16", "`LOCAL_WORLD_SIZE` the number on this machine"),
    "node": (r"\bnodes?\b", "00", "c83", "A **node** is one machine"),
    "data parallelism": (r"data parallel", "00", "c83", "every rank has the whole model"),
    "DDP": (r"\bDDP\b|DistributedDataParallel", "00", "c83", "(DDP, PyTorch's data parallelism)"),
    "NVLink": (r"NVLink", "00", "c02", "the links that you will see below"),
    "PCIe": (r"PCIe", "00", "c02", "the links that you will see below"),
    "InfiniBand": (r"InfiniBand", "00", "c02", "the links that you will see below"),
    "SXM": (r"SXM", "00", "c64", "(the version with NVLink)"),
    "NDR": (r"\bNDR\b", "00", "c64", "NDR InfiniBand (400 Gbit/s per adapter)"),
    "GB": (r"\bGB\b", "00", "c64", "A GB is 10⁹ bytes"),
    "broadcast": (r"broadcast", "00", "c18", "one rank's tensor goes to all"),
    "reduce-scatter": (r"reduce.scatter", "00", "c22", "every rank keeps only its own slice"),
    "ZeRO": (r"ZeRO", "00", "c22", "the Zero Redundancy Optimizer"),
    "practice edition": (r"practice edition", "00", "c22", "such functions are empty, and you write them"),
    "all-gather": (r"all.gather", "00", "c24", "afterwards all ranks have all parts"),
    "FSDP": (r"\bFSDP\b", "00", "c24", "Fully Sharded Data Parallel"),
    "shard": (r"\bshard", "00", "c24", "in slices (*shards*)"),
    "all-to-all": (r"all.to.all", "00", "c26", "one part for each other rank"),
    "pipeline": (r"[Pp]ipeline parallel", "00", "c28", "is made of them"),
    "ring": (r"\bring\b", "00", "c28", "which makes a ring"),
    "SHARP": (r"SHARP", "00", "c69", "Network switches can do the adding"),
    "NVLS": (r"NVLS", "00", "c69", "over NVLink NVLS"),
    "loopback": (r"loopback", "00", "c69", "the network device of a machine that talks to itself"),
    "barrier": (r"[Bb]arrier", "00", "c69", "points at which all ranks wait for each other"),
    "latency": (r"[Ll]atency", "00", "c36", "Every message has a fixed price"),
    "bandwidth": (r"[Bb]andwidth", "00", "c36", "the inverse of the **bandwidth**"),
    "bucket": (r"[Bb]uckets?\b", "00", "c39", "collects them until a message is large enough"),
    "NVML": (r"NVML|nvml", "00", "c41", "the library behind `nvidia-smi`"),
    "allocator": (r"[Aa]llocator", "00", "c41", "the part that hands out GPU memory to tensors"),
    "allocated": (r"\b[Aa]llocated\b", "00", "c41", "belong to tensors that exist"),
    "reserved": (r"\b[Rr]eserved\b", "00", "c41", "all that the allocator took from the driver"),
    "CUDA context": (r"CUDA context", "00", "c41", "what the driver itself keeps per process"),
    "resident": (r"\bresident\b", "00", "c41", "its share of the machine's RAM"),
    "kernel": (r"\bkernels?\b", "00", "c46", "the programs that run on a GPU"),
    "cuBLAS": (r"cuBLAS", "00", "c46", "NVIDIA's library for matrix multiplication"),
    "workspace": (r"\bworkspaces?\b", "00", "c46", "scratch memory that it keeps"),
    "storage": (r"\bstorages?\b", "00", "c48", "the memory behind it"),
    "fragmentation": (r"fragment", "00", "c81", "No block goes back although half of the memory is free"),
    "ChatGLM3": (r"ChatGLM3", "01", "m02", "the model that chapter 14 fine-tunes"),
    "MLP": (r"\bMLP\b", "01", "m02", "the two-step network after attention"),
    "LoRA": (r"LoRA|\bLora\b|\blora\b", "01", "m02", "freezes the weights and trains thin matrices"),
    "adapter": (r"LoRA adapter|\badapters\b", "01", "m02", "(an *adapter*)"),
    "planner": (r"planner", "01", "m02", "predicts the memory of a job and compares ways to train it"),
    "micro-batch": (r"micro.batch", "01", "m02", "the number of sequences that one GPU processes at once"),
    "model states": (r"model states", "01", "m06", "weights, gradients and Adam's numbers"),
    "activations": (r"[Aa]ctivations", "01", "m06", "the tensors that forward keeps for backward"),
    "TB": (r"\bTB\b", "01", "m06", "GB and TB are powers of ten"),
    "FLOP": (r"\bFLOP\b", "01", "m10", "floating-point operations"),
    "TFLOP": (r"TFLOP", "01", "m10", "a TFLOP is 10¹² of them"),
    "tensor cores": (r"tensor cores", "01", "m10", "its units for matrix multiplication"),
    "arithmetic intensity": (r"arithmetic intensity", "01", "m12", "its FLOP per byte of memory traffic"),
    "MFU": (r"\bMFU\b", "01", "m82", "model FLOP utilisation"),
    "fp32": (r"\bfp32\b", "01", "m82", "fp32 with 32 bits"),
    "autocast": (r"[Aa]utocast", "01", "m84", "keeps all weights in fp32 and multiplies 16-bit copies"),
    "master weights": (r"[Mm]aster weights|\bmasters\b", "01", "m84", "the optimizer keeps an fp32 copy of it"),
    "loss scaling": (r"loss scaling", "01", "m84", "multiply the loss by a large factor"),
    "checkpointing": (r"checkpointing", "01", "m84", "forward keeps only the input of each layer"),
    "autograd": (r"\bautograd\b", "01", "m14", "PyTorch's automatic differentiation"),
    "ledger": (r"\bledger\b", "01", "m14", "adds up every storage"),
    "Adam's moments": (r"\bmoments\b", "01", "m22", "running means of the gradient and of its square"),
    "SwiGLU": (r"SwiGLU", "01", "m28", "Two matrices, gate and up"),
    "SiLU": (r"SiLU", "01", "m28", "a smooth function"),
    "GELU": (r"GELU", "01", "m30", "another smooth function"),
    "DeepSpeed": (r"DeepSpeed", "01", "m89", "Microsoft's library for training large models"),
    "rotary": (r"rotary", "01", "m38", "constants for the positions in a sequence"),
    "logits": (r"\blogits\b(?!=)", "01", "m42", "the model's scores"),
    "expandable segments": (r"expandable.segments", "01", "m52", "Such a segment grows when it needs to"),
    "held out": (r"held out", "01", "m56", "no constant was fitted to them"),
    "NVMe": (r"NVMe", "01", "m66", "a fast local disk"),
    "accumulation": (r"\baccumulation\b", "01", "m66", "several micro-batches per optimizer step"),
    "overlap": (r"\boverlap\b", "02", "0002", "messages travel while ranks compute"),
    "hook": (r"\bhooks?\b", "02", "0048", "a function that PyTorch calls at a certain moment"),
    "no_sync": (r"no_sync", "02", "0058", "switches the hooks off"),
    "FSDP2": (r"FSDP2", "02", "0068a", "the current version of FSDP"),
    "weak scaling": (r"weak scaling", "02", "0068a", "each rank keeps its number of rows"),
    "strong scaling": (r"strong scaling", "02", "0074", "a *fixed global batch*"),
    "watchdog": (r"watchdog", "02", "0076", "a thread that checks on collectives"),
}


@pytest.fixture(scope="module")
def cells():
    """Cells in reading order: chapter, cell, kind, text. Headings of the references do not count."""
    found = []
    for stem in CHAPTERS:
        for cell in json.loads((NOTEBOOKS / f"{stem}.ipynb").read_text(encoding="utf-8"))["cells"]:
            text, _, _ = "".join(cell["source"]).partition("## References")
            found.append((stem[:2], cell["id"], cell["cell_type"], text))
    return found


@pytest.mark.parametrize("term", EXPLAINED)
def test_a_term_is_explained_where_it_is_first_used(cells, term):
    pattern, chapter, cell_id, explanation = EXPLAINED[term]
    places = [(number, name) for number, name, _, _ in cells]
    text = cells[places.index((chapter, cell_id))][3]
    assert explanation in text, f"chapter {chapter}, cell {cell_id} no longer explains {term!r}"
    uses = (place for place, cell in zip(places, cells, strict=True) if re.search(pattern, cell[3]))
    first = next(place for place in uses if place != TABLE_OF_LETTERS)
    assert places.index(first) >= places.index((chapter, cell_id)), (
        f"{term!r} is used in chapter {first[0]}, cell {first[1]}, before chapter {chapter}, cell {cell_id} explains it"
    )


def test_every_abbreviation_is_known_or_explained(cells):
    unknown = {}
    for chapter, cell_id, kind, text in cells:
        prose = re.sub(r"```.*?```|\$[^$]*\$|`[^`]*`", "", text if kind == "markdown" else "", flags=re.DOTALL)
        for word in ABBREVIATION.findall(prose):
            if word not in KNOWN and word not in EXPLAINED:
                unknown.setdefault(word, f"chapter {chapter}, cell {cell_id}")
    assert not unknown
