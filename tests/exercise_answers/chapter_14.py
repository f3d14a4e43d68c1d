"""Wrong answers to the exercises of chapter 14: by judge, what the verdict says, and the answer."""

WRONG = {
    "encode": {
        "id 5 differs": (
            'tokenizer.encode_text("\\n") + tokenizer.encode_text(text)',
            'tokenizer.encode_text("\\n" + text)',
        ),
        "there are 12 ids": ("return [*ids, last]", "return ids"),  # without an end it would never learn to stop
        "should be learned, as itself": ("opening if learns else -100", "-100"),
        "id 0 ([gMASK]) should not be learned": ("[-100] * len(ids), False", "list(ids), False"),
        "(<|assistant|>) should not be learned": (
            "        labels.append(opening if learns else -100)  # it ends the turn before\n"
            '        learns = role == "assistant"\n',
            '        learns = role == "assistant"\n        labels.append(opening if learns else -100)\n',
        ),
        "observation, assistant, user, id": ("last if learns else -100", "last"),
    },
    "lora_layer": {
        "forward does not return": ("return self.linear(x) + self.scale * ", "return self.linear(x) + "),
        "operations": ("(x @ self.A.T @ self.B.T)", "(x @ (self.B @ self.A).T)"),
        "A and B should get gradients": ("(x @ self.A.T @ self.B.T)", "(x @ self.A.T @ self.B.T.detach())"),
        "the merged layer does not return": ("self.linear.weight += self.scale *", "self.linear.weight +="),
        "is a second matrix": (
            "        self.linear.weight += self.scale * self.B @ self.A\n",
            "        self.linear.weight = torch.nn.Parameter(self.linear.weight + self.scale * self.B @ self.A)\n",
        ),
        "merge returns Parameter": ("        return self.linear\n", "        return self.linear.weight\n"),
        "raised RuntimeError": ("(x @ self.A.T @ self.B.T)", "(x @ self.A @ self.B)"),
    },
    "pack": {
        "has position": (
            "positions = torch.cat([torch.arange(len(part)) for part, _ in pieces])",
            "positions = torch.arange(capacity)",
        ),
        "would have to predict it": ("    labels[positions == 0] = -100\n", ""),
        "of another example": ("(number[:, None] == number).tril()", "(number[:, None] >= number).tril()"),
        "of its own example": (".tril()", ""),
        "for examples of [6] tokens in a pack of 7, ids should be": (
            "torch.full((room,), pad)",
            "torch.full((room,), 3)",
        ),
        "it changes the labels": (
            "    room = ",
            "    for _, labels in examples:\n        labels[0] = -100\n    room = ",
        ),
    },
    "trained_with_o_proj": {
        "917,504 too few": "trained_parameters = 4_702_208",  # in, without out
        "61,931,520 too many": "trained_parameters = 67_551_232",
    },
    "passes": {
        "for 2 GPUs": "def passes(gpus):\n    return 3000 * 4 / 114_599",
        "0.25 times the right number": "def passes(gpus):\n    return 3000 * gpus / 114_599",
    },
    "second_answer": {
        "the four messages must stay": (  # the first turn deleted
            '    {"role": "user", "content": "裙"},\n    {"role": "assistant", "content": "红色", "loss": False},\n',
            "",
        ),
        "红色 is still learned": (', "loss": False', ""),
        "蓝色 is not learned": ('"蓝色"', '"蓝色", "loss": False'),
    },
    "fit_it": {
        "on one GPU the job needs": ("gradient_checkpointing: true", "quantization_bit: 4"),
        "on 2 GPUs with ds_zero_2.json": ("ds_zero_3.json", "ds_zero_2.json"),
        "batch and the length": ("gradient_checkpointing: true", "per_device_train_batch_size: 1"),
        "is not one line": ("gradient_checkpointing: true", "checkpointing"),
    },
}

RIGHT = {
    "pack": (("return ids, labels, positions, sees", "return [ids, labels, positions, sees]"),),
    "fit_it": (('"ds_zero_3.json"', '"configs/ds_zero_3.json"'),),
}
