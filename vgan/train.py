"""`python -m vgan.train`, as older job scripts start it; `vgan-train` is the same command."""

if __name__ == "__main__":
    from vgan.cli import train_main

    train_main()
