"""One job per module: `run(config, workdir, flags)`, declared in a `Job` that `table` lists."""
