// A watch by go-spiffe's first version, whose dialer puts the socket's path into :authority, through what the script that runs it does.
// It is a program of its own: it and the present version declare the same messages.
//
//	go run ./first SOCKET
package main

import (
	"os"

	"durward.test/interop/steps"
	"github.com/spiffe/go-spiffe/workload"
)

type watcher struct{ *steps.Told }

func (w watcher) UpdateX509SVIDs(svids *workload.X509SVIDs) {
	serials := map[string]string{}
	for _, svid := range svids.SVIDs {
		serials[steps.Last(svid.SPIFFEID)] = svid.Certificates[0].SerialNumber.String()
	}
	w.Tell(serials)
}

// A watch goes on by itself: what it meets in between is its own business.
func (watcher) OnError(error) {}

func main() {
	told := &steps.Told{}
	client, err := workload.NewX509SVIDClient(watcher{told}, workload.WithAddr("unix://"+os.Args[1]))
	if err != nil {
		panic(err)
	}
	if err := client.Start(); err != nil {
		panic(err)
	}
	defer client.Stop() //nolint:errcheck // it only says that it was not started
	steps.Follow(map[string]*steps.Client{"go-spiffe, version 1": {Told: told}})
}
