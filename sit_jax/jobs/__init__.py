"""One job each: a function of (config, workdir) that main starts."""
