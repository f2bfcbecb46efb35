"""mq-quant: turns the FP8 checkpoint of MiniMax-M2.7 into files for the hipfire engine."""
