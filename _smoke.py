import sys
sys.path.insert(0,'.')
import tests.audits.table as t
t.NUM_CANARIES, t.NUM_GUESSES = 60, 12
t.SETTINGS["num_steps"]=8
t.plan_bound=lambda *a,**k: 0.0
if __name__=="__main__":
    t.main(["--seed","1"])
