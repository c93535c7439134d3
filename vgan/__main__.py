"""`python -m vgan COMMAND ...`; the console script `vgan` is the same."""

if __name__ == "__main__":
    from vgan.cli import main

    main()
