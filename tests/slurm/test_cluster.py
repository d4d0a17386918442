def test_up(slurm):
    assert slurm.run("sinfo", "-h", "-o", "%D").strip()

def test_l(slurm_launch):
    print(slurm_launch("runs"))
