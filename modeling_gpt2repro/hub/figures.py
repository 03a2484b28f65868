"""The command `python -m modeling_gpt2repro.hub.figures`; it lives in runs/figures.py."""

from modeling_gpt2repro.runs.figures import main

if __name__ == "__main__":
    main()
