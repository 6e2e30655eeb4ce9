// A watch by a beta of go-spiffe's second version, which puts the socket's path into :authority, through what the script that runs
// it does. It has a list of modules of its own: what it is built with is older than what the others are.
//
//	go run -modfile=beta.mod ./beta SOCKET
package main

import (
	"context"
	"os"

	"durward.test/interop/steps"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// A watch goes on by itself: what it meets in between is its own business.
type watch struct{ *steps.Told }

func (w watch) OnX509ContextUpdate(update *workloadapi.X509Context) {
	serials := map[string]string{}
	for _, svid := range update.SVIDs {
		serials[steps.Last(svid.ID.String())] = svid.Certificates[0].SerialNumber.String()
	}
	w.Tell(serials)
}

func (watch) OnX509ContextWatchError(error) {}

func main() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	client, err := workloadapi.New(ctx, workloadapi.WithAddr("unix://"+os.Args[1]))
	if err != nil {
		panic(err)
	}
	told := &steps.Told{}
	go client.WatchX509Context(ctx, watch{told}) //nolint:errcheck // it ends with us
	call := func() ([]string, error) {
		ctx, cancel := context.WithTimeout(ctx, steps.Patience)
		defer cancel()
		// Of tokens it returns the first alone.
		if _, err := client.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "a"}); err != nil {
			return nil, err
		}
		svids, err := client.FetchX509SVIDs(ctx)
		var ids []string
		for _, svid := range svids {
			ids = append(ids, steps.Last(svid.ID.String()))
		}
		return ids, err
	}
	steps.Follow(map[string]*steps.Client{"go-spiffe, version 2.0.0-beta.1": {Told: told, Call: call}})
}
