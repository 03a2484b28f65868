"""The command `python -m modeling_gpt2repro.hub.push`; it lives in hub/upload.py."""

import os
import threading

from modeling_gpt2repro.hub.upload import main

END_WITH_STDIN = "GPT2REPRO_END_WITH_STDIN"  # set by a training for the pushes that it starts


def end_with_stdin():
    """End this process with its standard input: a pipe whose other end is the training's, and ends with it.

    However a training ends, also by `kill -9`, the system closes its files: so no push outlives it. This works on all
    systems. The Hub applies a commit completely or not at all.
    """

    def wait():
        while os.read(0, 1):  # not sys.stdin, whose lock the interpreter needs when it exits
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    if os.environ.get(END_WITH_STDIN):
        end_with_stdin()
    main()
