"""`python -m benchmarks.speed`; `cli` has the options. Child processes import this module too: it must be light."""

if __name__ == "__main__":
    import typer

    from benchmarks.speed.cli import main

    typer.run(main)
