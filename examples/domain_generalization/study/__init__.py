"""The study runner: one for all data sets. Every module imports only those above it.

settings      every number of a study, its flag, and the two presets
methods       the rows of the table: what is trained, with which perturbation and which freezing
data          what a data set provides, and its mini-batches
ranks         the processes of torchrun
averaging     SWAD: dense averaging of weights, with a start and an end by loss
training      one phase of training, which can stop after any step and go on to the same bits
storage       files that are written whole or not at all
jobs          a training and its folder
report        statistics of paired cells, and the table
job_training  from a start or a checkpoint to a result
runner        many jobs: processes, slices, failures
cluster       the same on Slurm
options       the command line
program       the main function of every script
"""
