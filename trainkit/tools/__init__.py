"""The verbs behind scripts/: `main(argv)` and --help each. No verb imports another one."""
