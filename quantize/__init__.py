"""The pipeline: recipe, plan, build, calibrate and the command line. Stands on top of all other rooms."""
