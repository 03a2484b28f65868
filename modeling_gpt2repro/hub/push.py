"""The command `python -m modeling_gpt2repro.hub.push`; it lives in hub/upload.py."""

from modeling_gpt2repro.hub.upload import main

if __name__ == "__main__":
    main()
