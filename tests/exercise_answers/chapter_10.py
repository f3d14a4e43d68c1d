"""Wrong answers to the exercises of chapter 10: by judge, what the verdict says, and the answer."""

SUBMIT_NEXT = """            if i + 1 < len(parameters):
                coming = drive.submit(noted, log, "drive", "read", fetch, disk, i + 1)
"""
UPDATE = """            noted(log, "processor", "Adam", update, parameter, states, step)
"""
WRITE = """            drive.submit(noted, log, "drive", "write", store, disk, i)
"""
COMPLETE = "    if all(parameter.grad is not None for parameter in own):\n"
DROP = "        self.drop(i)\n"
ONE_BY_ONE = "def ahead_by(n, count, read, work):\n    for i in range(count):\n        work(i, read(i))"
# Reads ahead, but in the thread that works.
WITHOUT_THREADS = """def ahead_by(n, count, read, work):
    values = [read(i) for i in range(min(n, count))]
    for i in range(count):
        if i + n < count:
            values.append(read(i + n))
        work(i, values[i])
"""
# As many threads, but a thread that has ended goes on with the next record.
EVERYTHING = """def ahead_by(n, count, read, work):
    with ThreadPoolExecutor(n) as pool:
        for i, value in enumerate(pool.map(read, range(count))):
            work(i, value)
"""
ONE_THREAD = ("ThreadPoolExecutor(n)", "ThreadPoolExecutor(1)")

WRONG = {
    "fetch_and_store": {
        "should return the record's 5 numbers in fp32": ("[: disk.lengths[i]]", ""),
        "should return a view of the buffer": ("[: disk.lengths[i]]", "[: disk.lengths[i]].clone()"),
        "disk.moved has grown by": (
            'disk.moved["read"] += os.preadv(disk.fd, [record(disk, i).numpy()], disk.places[i])',
            "os.preadv(disk.fd, [record(disk, i).numpy()], disk.places[i])",
        ),
        "that were last stored": ("[record(disk, i).numpy()], disk.places[i]", "[record(disk, i).numpy()], 0"),
        "raised TypeError": ("[record(disk, i).numpy()], disk.places[i]", "record(disk, i), disk.places[i]"),
    },
    "reading_ahead": {
        "no thread reads record 1": (SUBMIT_NEXT + UPDATE, UPDATE + SUBMIT_NEXT),
        "before its update has ended": (UPDATE + WRITE, WRITE + UPDATE),
        "into the buffer of record": ("ThreadPoolExecutor(1)", "ThreadPoolExecutor(2)"),
        "have not been written back": (WRITE, ""),
        "record 1 is read, and": ("if i + 1 < len(parameters):", "if True:"),
        "a step is used": ("update, parameter, states, step", "update, parameter, states, 1"),
        "a disk is used": ("fetch, disk, i + 1", "fetch, None, i + 1"),
        "the log has": (WRITE, "            drive.submit(store, disk, i)\n"),
    },
    "drop_and_load": {
        "where it is: autograd": (
            "self.flat[i].untyped_storage().resize_(0)",
            "self.flat[i] = self.flat[i][:0].clone()",
        ),
        "of layers have been in memory at once": (
            "sum(flat.untyped_storage().nbytes() for flat in self.flat)",
            "flat.nbytes",
        ),
        "raised RuntimeError": ("self.whole(fetch(self.disk, i))", "fetch(self.disk, i)"),
        "have memory, but it should be": (
            "    self.flat[i].untyped_storage().resize_(0)\n",
            "    self.flat[i].zero_()\n",
        ),
    },
    "on_gradient": {
        "1 of 3 gradients have come": (COMPLETE + DROP, "    self.drop(i)\n" + COMPLETE),
        "raised AttributeError": ("if all(", "if any("),
        "still has its gradient": ("            parameter.grad = None\n", "            pass\n"),
        "what self.mine makes": (
            "self.mine(torch.cat([parameter.grad.flatten() for parameter in own]))",
            "torch.cat([parameter.grad.flatten() for parameter in own])",
        ),
        "self.drop should be called once": (DROP, ""),
    },
    "sharded": {
        "own should return part": (".chunk(n)[dist.get_rank()]", ".chunk(n)[0]"),
        "mean over ranks": ("-gradient.numel() % n)) / n", "-gradient.numel() % n))"),
        "without padding": ("[: self.flat[0].numel()]", ""),
        "are enough": (
            "dist.reduce_scatter_tensor(part, padded)",
            "dist.all_reduce(padded)\n        part.copy_(padded.chunk(n)[dist.get_rank()])",
        ),
    },
    "tiled": {
        "tiles are in memory at once": (
            "torch.cat([x @ tiles.read(i).T for i in range(len(tiles.shapes))], dim=1)",
            "x @ torch.cat([tiles.read(i) for i in range(len(tiles.shapes))]).T",
        ),
        "the gradient of x is not right": ("gradient += part", "gradient = part"),
        "is not the gradient of that tile": ("(part.T @ x)", "(x.T @ part)"),
        "raised RuntimeError": ("return gradient, None", "return gradient"),
    },
    "fast_enough": {
        "too high": "percent = 62.1",  # the intensity of weights
        "too low": "percent = 0.29",  # a share, and no percent
    },
    "how_many_drives": {
        "too few: they reach 79%": "drives = 9",
        "too many": "drives = 11",
        "only whole drives": "drives = 9.8",
    },
    "ahead_by": {
        "record 4 is read, and": ("if i + n < count:", "if i + n <= count:"),
        "in another thread": (
            "            work(i, value)",
            "            with ThreadPoolExecutor(1) as other:\n                other.submit(work, i, value)",
        ),
        "with n = 1, while record 0 is worked on, the read of record 1 has not begun": ONE_BY_ONE,
        "meanwhile no work is done": WITHOUT_THREADS,
        "for which there is no buffer": EVERYTHING,
        "with n = 2, while record 0 is worked on, the read of record 2 has not begun": ONE_THREAD,
    },
}
