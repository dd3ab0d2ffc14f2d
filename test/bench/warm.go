package main

import (
	"context"
	"fmt"
	"time"
)

// warmSize is the default of pool.size.
const warmSize = 2

// measureWarm measures one-shots that find a sandbox ready. Between two turns the pool is
// left the time to fill up again, which does not count; how long a turn took with it is
// told, since that is the pace at which every request finds one.
func measureWarm(ctx context.Context, _ *daemon, o options) error {
	d, err := startDaemon(ctx, o.bin, warmSize)
	if err != nil {
		return err
	}
	defer d.stop()
	crun, err := startCrun(ctx)
	if err != nil {
		return err
	}
	defer crun.stop()
	var pace sample
	claims := 0
	samples, err := turns(ctx, o.n,
		func() (time.Duration, error) {
			begun := time.Now()
			if err := d.filled(ctx); err != nil {
				return 0, err
			}
			t, _, err := d.firstByte(ctx, "", "/bin/echo", "hi")
			pace = append(pace, time.Since(begun))
			claims++
			return t, err
		},
		func() (took time.Duration, err error) { return took, crun.ask("run", &took) })
	if err != nil {
		return err
	}
	info, err := d.client.Admin().GetServerInfo(ctx, nil)
	if err != nil {
		return err
	}
	if hits := info.GetWarmPool().GetHits(); hits != int64(claims) {
		return fmt.Errorf("%d of %d one-shots found a sandbox ready: these are not warm starts", hits, claims)
	}
	name := fmt.Sprintf("one-shot in a sandbox that was ready (pool of %d, one turn every %s) to the first byte", warmSize, ms(pace.quantile(.5)))
	o.results.compare(name, samples[0], "crun run (overlay, control groups)", samples[1], "≤ 0.35")
	return nil
}

// filled waits until the pool is full.
func (d *daemon) filled(ctx context.Context) error {
	for range 3000 {
		info, err := d.client.Admin().GetServerInfo(ctx, nil)
		if err != nil || info.GetWarmPool().GetReady() == warmSize {
			return err
		}
		time.Sleep(10 * time.Millisecond)
	}
	return fmt.Errorf("the pool does not fill up")
}
