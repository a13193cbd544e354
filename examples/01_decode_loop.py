"""The bare decode loop: the CPU writes one 64-byte descriptor and reads 64-byte records. There is nothing else between tokens.

Run: python examples/01_decode_loop.py [MODEL] [DEVICE]        (default: smollm2 auto)
"""

import sys

from imex_persist import abi, planner
from imex_persist.model.load import load_model
from imex_persist.runtime.allocator import pages_needed
from imex_persist.runtime.group import Group
from imex_persist.runtime.placement import place_ranks

MAX_MODEL_LEN, MAX_TOKENS = 512, 24


def main(name: str = "smollm2", device: str = "auto") -> None:
    model = load_model(name)
    prompt = model.require_tokenizer().encode_chat([{"role": "user", "content": "What is the capital of France?"}])

    # One rank in one child process; this process only sees the mailbox.
    group = Group(place_ranks(device, 1), deadline_s=20)
    try:
        (machine,) = group.open()
        shape = planner.make_shape(model.config, max_rows=8, max_model_len=MAX_MODEL_LEN, machine=machine)
        mailbox = group.launch(shape, {"model": name, "load_format": "auto", "seed": 0}, MAX_MODEL_LEN)
        print(f"the kernel is resident: {int(shape['num_blocks'])} blocks, {int(shape['ring_stages'])} ring stages")

        # The descriptor. The host chooses the slot and the KV pages; prompt, pages and stop tokens go to the slot's arena.
        pages = range(pages_needed(len(prompt), MAX_TOKENS, int(shape["page_size"])))
        sequence = mailbox.submit(
            request=1, slot=0, prompt=prompt, pages=pages, stop=model.eos_token_ids, max_tokens=MAX_TOKENS
        )
        print(
            f"-> descriptor {sequence}: SUBMIT, {len(prompt)} prompt tokens, {len(pages)} KV page(s), up to {MAX_TOKENS} tokens"
        )

        # The records. RELEASE says that slot, pages and arena may be used again.
        released = False
        while not released and group.error is None:
            for record in mailbox.poll():
                text = ""
                if record.kind == abi.Record.TOKEN:
                    piece = model.tokenizer.decode([record.token], skip_special_tokens=False)
                    text = f"token {record.token:6d} {piece!r:14} {abi.Finish(record.finish).name.lower()}"
                print(f"<- record {record.sequence}: {abi.Record(record.kind).name:7} {text}")
                released = released or record.kind == abi.Record.RELEASE
        print(f"{mailbox.steps} steps, and no call into the device in between")
    finally:
        group.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
