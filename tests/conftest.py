"""Makes the modules beside this file (samples, oracles) importable by the tests below it: pytest adds its folder."""
