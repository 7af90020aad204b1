"""One job a module: `run(config, workdir, flags)`, declared in a `Job` that `table` lists."""
